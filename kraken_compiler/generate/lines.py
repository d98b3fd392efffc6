"""Lines of standard input, read without blocking: between them the ranks must show that they live."""

from __future__ import annotations

import os
import select

from kraken_compiler.errors import UsageError
from kraken_compiler.text import bad_byte, decoded

_CHUNK = 1 << 16


class Lines:
    """Reads a file descriptor line by line."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._bytes = b""
        self._closed = False
        self._count = 0

    @property
    def ended(self) -> bool:
        """True once there will be no more lines."""
        return self._closed and not self._bytes

    def poll(self, seconds: float) -> str | None:
        """The next line without its end; None if there is none within some seconds, or no more at all.

        Raises:
            UsageError: The line is not UTF-8; the next call gives the one after it.
        """
        while b"\n" not in self._bytes and not self._closed:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                return None
            content = os.read(self._descriptor, _CHUNK)
            self._bytes += content
            self._closed = not content
        if not self._bytes:
            return None
        line, _, self._bytes = self._bytes.partition(b"\n")
        self._count += 1
        try:
            text = decoded(line) if self._count == 1 else line.decode()
        except UnicodeDecodeError:
            raise UsageError(f"standard input: line {self._count} is not UTF-8 text ({bad_byte(line)})") from None
        return text.rstrip("\r")
