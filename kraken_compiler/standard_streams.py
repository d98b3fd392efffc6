"""Standard output and error, which may be full, closed or of another encoding than the text. Imports no torch."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from kraken_compiler.errors import InputFileError


def prepare_streams() -> None:
    """Let any text be written: what an encoding does not have is written as `\\xef` or `\\u2603`.

    A stream that is closed goes nowhere, and no file that is opened takes its place.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number, so the missing one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has none for a descriptor that was closed, and prints what was meant for the one to the other.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def write_out(text: str) -> None:
    """Write to standard output, at once.

    Raises:
        InputFileError: It cannot be written, as on a full disk. A reader that has enough, such as `head`, is no error.
    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # What is left in the buffer would fail again when the interpreter ends.
        _discard(1)
        if isinstance(error, BrokenPipeError):
            return
        raise InputFileError(f"standard output: cannot be written: {error.strerror or error}") from error


def tell(text: str) -> None:
    """Write a line to standard error; if nobody can read it there, there is nobody to tell."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(2)


def _discard(descriptor: int) -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
