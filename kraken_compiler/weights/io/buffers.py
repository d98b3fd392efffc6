"""Memory for large tensors that come one after the other."""

from __future__ import annotations

import mmap
import sys
import threading
from contextlib import suppress

_LARGE_PAGE = 2 << 20
"""The size of a large page."""
_LARGEST_BUFFER = 256 << 20
"""The largest that `Buffers` keep."""
_OWN_REFERENCES = 2
"""`sys.getrefcount` of what only a list holds: the list, and the call."""


def aligned_buffer(size: int) -> mmap.mmap:
    """Zeros in memory that begin at a block, in large pages where the system has them.

    Such pages are what makes fresh memory cheap: a page of 4 KiB costs as much to get as to read it from a cached file.
    """
    # Private, for memory that could be shared is given in small pages.
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and size >= _LARGE_PAGE:
        with suppress(OSError):  # a kernel without them: the memory is the same
            buffer.madvise(advice)
    return buffer


class Buffers:
    """Memory for one large tensor after another: what nobody uses any more is used again.

    Fresh memory has to be found, cleared and mapped by the system, on a virtual machine by two of them, which takes
    longer than to read a cached file. A buffer is in use as long as anybody but this object refers to it; tensors made
    by `torch.frombuffer` do.
    """

    def __init__(self, smallest: int, most: int) -> None:
        """Keep nothing yet.

        Args:
            smallest: Bytes of the smallest buffer that is kept.
            most: How many are kept.
        """
        self._smallest, self._most = smallest, most
        self._buffers: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def release(self) -> None:
        """Keep nothing; what is in use goes with its last user."""
        with self._lock:
            self._buffers.clear()

    def take(self, size: int) -> mmap.mmap:
        """A buffer of at least this size, with anything in it."""
        if not self._smallest <= size <= _LARGEST_BUFFER:
            return aligned_buffer(size)
        with self._lock:
            free = [
                place for place in range(len(self._buffers)) if sys.getrefcount(self._buffers[place]) <= _OWN_REFERENCES
            ]
            fitting = [place for place in free if len(self._buffers[place]) >= size]
            if fitting:
                return self._buffers[min(fitting, key=lambda place: len(self._buffers[place]))]
            # One that is too small goes; else, of too many, the oldest, which whoever uses it keeps.
            if free or len(self._buffers) == self._most:
                del self._buffers[free[0] if free else 0]
            self._buffers.append(aligned_buffer(size))
            return self._buffers[-1]
