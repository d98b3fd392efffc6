"""Large writes that go from memory to the disk without a copy in the system's page cache.

A lane file is written once, is often larger than the memory, and is read by other processes later: a copy of it in the
page cache costs more processor time than hashing it, and pushes out the source that is still to be read. Direct writes
must begin and end at whole blocks, in memory too; what is before and behind them goes the usual way.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

_LARGE = 2 << 20
"""The size of a large page."""


def open_direct(path: Path) -> int | None:
    """A descriptor for direct writes to an existing file; None where the system or the file system has none.

    Raises:
        OSError: The file cannot be opened for another reason.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def aligned_buffer(size: int) -> mmap.mmap:
    """Zeros in memory that begin at a block, in large pages where the system has them.

    Such pages are what makes fresh memory cheap: a page of 4 KiB costs as much to get as to read it from a cached file.
    """
    buffer = mmap.mmap(-1, size)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and size >= _LARGE:
        with suppress(OSError):  # a kernel without them: the memory is the same
            buffer.madvise(advice)
    return buffer
