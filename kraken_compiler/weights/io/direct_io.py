"""Large reads and writes between memory and the disk, without a copy in the system's page cache.

A shard is written once, is often larger than the memory, and is read by other processes later; so is a source that
the memory cannot hold, which is read from its beginning to its end: a copy in the page cache costs more processor time
than hashing the bytes, and pushes out what somebody needs. Direct reads and writes must begin and end at whole blocks,
in memory too; what is before and behind them goes the usual way. Linux before 5.12 may lose what is read directly if
another thread forks in the meantime, so there all goes the usual way.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from kraken_compiler.errors import naming

BLOCK = 4096
"""Alignment of direct reads and writes, in the file and in memory; a multiple of every common disk's blocks."""

_SHARE_OF_MEMORY = 0.5
_FIRST_SAFE_LINUX = (5, 12)


def open_direct(path: Path, mode: int = os.O_WRONLY) -> int | None:
    """A descriptor for direct writes, or reads, of an existing file; None where there are none that can be trusted.

    The system or its file system may have none, or lose what was read.

    Raises:
        OSError: The file cannot be opened for another reason.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or not _keeps_what_is_read():
        return None
    try:
        return os.open(path, mode | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


@functools.cache
def _keeps_what_is_read() -> bool:
    """False if a fork in another thread may spoil a direct read, or if that is not known."""
    kernel = os.uname()
    if kernel.sysname != "Linux":
        return True
    version = re.match(r"(\d+)\.(\d+)", kernel.release)
    return version is not None and (int(version[1]), int(version[2])) >= _FIRST_SAFE_LINUX


def would_flood_the_cache(files: Iterable[Path]) -> bool:
    """True if files together take more than half of the machine's memory.

    Raises:
        OSError: There is no such file.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sum(path.stat().st_size for path in files) > _SHARE_OF_MEMORY * memory


class LargeFile:
    """A file to be read in large pieces.

    Args:
        path: The file.
        direct: Read past the page cache where the system can; False reads as usual.

    Raises:
        OSError: It cannot be opened or read; names it (also from `read`).
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = open_direct(path, os.O_RDONLY) if direct else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, buffer: memoryview, start: int) -> int:
        """Fill a buffer.

        Args:
            buffer: Where to; it begins at a block in memory and ends at one.
            start: Where in the file to begin, at a block.

        Returns:
            How many bytes were read: fewer than the buffer holds only if the file ends.
        """
        assert start % BLOCK == 0 == len(buffer) % BLOCK, "direct reads are of whole blocks"
        done = 0
        with naming(self._path):
            if self._direct is not None:
                done = self._read_directly(buffer, start, self._direct)
            while done < len(buffer):
                count = os.preadv(self._file, [buffer[done:]], start + done)
                if not count:
                    break
                done += count
        return done

    @staticmethod
    def _read_directly(buffer: memoryview, start: int, file: int) -> int:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(file, [buffer[done:]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # a disk of larger blocks: the usual way does it
            done += count
            if count % BLOCK or not count:
                break  # the file ends
        return done
