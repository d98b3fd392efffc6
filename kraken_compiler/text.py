"""Text that users hand in, as UTF-8, and text that they are shown. Imports no torch."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
    """The error of `not_utf8` for bytes that were read already, and might not be there a second time."""
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


def number_text(value: float, spec: str) -> str:
    """A number for people; `spec` is how `format` writes a finite one, e.g. ".3g"."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return format(value, spec)


def json_text(data: Any, *, sort_keys: bool = False) -> str:
    """A JSON document; null stands for numbers that are infinite or not a number, for which JSON has no word."""
    return json.dumps(_finite(data), indent=1, sort_keys=sort_keys, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def format_bytes(count: float) -> str:
    """A byte count for people, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as aligned columns under a header."""
    body = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in body]


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all; an old one is replaced.

    Raises:
        OSError: It cannot be written; nothing of it is left, and the old one is untouched.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
