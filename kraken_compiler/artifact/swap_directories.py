"""Swapping two directories in one step, so that there is no moment at which one of the names is missing."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_CURRENT_DIRECTORY = -100
_EXCHANGE = 2


def exchange(first: Path, second: Path) -> bool:
    """Swap what two names of one file system stand for (Linux, `renameat2`).

    Returns:
        False, with nothing done, where the system or the file system cannot.

    Raises:
        OSError: It can and failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    # The names are bytes and the file descriptors ints, which ctypes passes as they are.
    if rename(_CURRENT_DIRECTORY, os.fsencode(first), _CURRENT_DIRECTORY, os.fsencode(second), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(second))
