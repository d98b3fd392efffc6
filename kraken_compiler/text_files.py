"""Text that users hand in: UTF-8, with or without a byte order mark, and where it is no UTF-8. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from kraken_compiler.errors import InputFileError, UsageError

ENCODING = "utf-8-sig"
"""UTF-8 of which a byte order mark at the beginning is no part."""

_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def decoded(content: bytes) -> str:
    """The text of bytes; lines end as they are.

    Raises:
        UnicodeDecodeError: They are no UTF-8.
    """
    return content.decode(ENCODING)


def not_utf8(path: Path, option: str) -> InputFileError:
    """The error for a text file that is no UTF-8; says in which line.

    Args:
        path: The file.
        option: The option that named it.
    """
    place = ""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if bad := bad_byte(line):
                    place = _place(number, line, bad)
                    break
    except OSError as error:
        return InputFileError(f"{option}: cannot read {path}: {error.strerror or error}")
    return InputFileError(f"{option}: {path} is not UTF-8 text{place}")


def bytes_not_utf8(content: bytes, path: Path, option: str) -> InputFileError:
    """The same for a file whose bytes were read already, and might not be there a second time."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if bad := bad_byte(line):
            return InputFileError(f"{option}: {path} is not UTF-8 text{_place(number, line, bad)}")
    return InputFileError(f"{option}: {path} is not UTF-8 text")


def bad_byte(content: bytes) -> str:
    """The first byte that is no UTF-8, for messages; "" if there is none."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{content[error.start]:02x}"
    return ""


def require_text(text: str, option: str) -> None:
    """Make sure that what the command line gave is text: bytes that are no UTF-8 arrive as lone surrogates.

    Raises:
        UsageError: It is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ord(text[error.start])
        what = f"byte 0x{character - 0xDC00:02x}" if 0xDC80 <= character <= 0xDCFF else f"surrogate U+{character:04X}"
        raise UsageError(f"{option}: not UTF-8 text ({what} at character {error.start + 1})") from None


def _place(number: int, line: bytes, bad: str) -> str:
    if number == 1 and line.startswith(_UTF_16_MARKS):
        return " (it begins like UTF-16)"
    return f" (line {number}, {bad})"
