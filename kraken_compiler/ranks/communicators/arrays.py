"""`ArraySums`: sums and gathers of numpy arrays, for ranks that have no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kraken_compiler.ranks.communicators.sums import MessageSums

Array = npt.NDArray[Any]


class ArraySums(MessageSums[Array]):
    """Sums numpy arrays; see `MessageSums`. `reduce_dtype` is a numpy dtype."""

    def _contiguous(self, x: Array, dtype: Any = None) -> Array:
        part = np.asarray(x, order="C")
        rounds = dtype is not None and dtype.itemsize < part.itemsize and part.dtype.kind not in "biu"
        return part.astype(dtype) if rounds else part

    def _bytes(self, x: Array) -> memoryview:
        # As bytes, because the types that numpy itself does not have cannot be looked at through a buffer.
        return x.reshape(-1).view(np.uint8).data

    def _flat(self, x: Array) -> Array:
        return x.reshape(-1)

    def _shaped(self, flat: Array, like: Array) -> Array:
        return flat.reshape(like.shape)

    def _view(self, memory: memoryview, like: Array) -> Array:
        return np.frombuffer(memory, like.dtype) if len(memory) else np.empty(0, like.dtype)

    def _empty(self, like: Array, dtype: Any) -> Array:
        return np.empty(like.shape, dtype)

    def _add(self, parts: Sequence[Array], out: Array) -> None:
        first, *others = (part if part.dtype == out.dtype else part.astype(out.dtype) for part in parts)
        if not others:
            np.copyto(out, first)
            return
        np.add(first, others[0], out=out)
        for other in others[1:]:
            np.add(out, other, out=out)

    def _join(self, parts: Sequence[Array], like: Array, dim: int) -> Array:
        return np.concatenate([self._shaped(part, like) for part in parts], dim)
