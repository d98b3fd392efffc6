"""`NamedBuffers`: memory for arrays that are computed again and again, in several sizes."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


_SMALL_BYTES = 64 << 10


class NamedBuffers:
    """Arrays by name, each in memory that is as large as the largest one of that name so far.

    A prompt comes after the single tokens of the one before. New memory for it would be new pages, and clearing and
    mapping tens of megabytes of them takes as long as a part of the prefill itself. Small arrays have memory of their
    own: large memory begins at a page, and what begins at the same place of many pages drives each other out of caches.
    """

    def __init__(self) -> None:
        self._memory: dict[Hashable, Array] = {}
        self._arrays: dict[Hashable, Array] = {}

    def take(self, name: Hashable, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The array of that name, with anything in it; those of that name before are overwritten.

        Args:
            name: Its name; all arrays of a name have one element type.
            shape: Its shape.
            dtype: Its element type.
        """
        count = math.prod(shape)
        key = name, count * dtype.itemsize <= _SMALL_BYTES
        array = self._arrays.get(key)
        if array is None or array.shape != shape:
            memory = self._memory.get(key)
            if memory is None or memory.size < count:
                memory = self._memory[key] = np.empty(count, dtype)
            array = self._arrays[key] = memory[:count].reshape(shape)
        return array
