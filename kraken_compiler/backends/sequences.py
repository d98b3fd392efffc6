"""The limits of a batch of sequences with a KV cache, whatever computes it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kraken_compiler.errors import UsageError

Array = npt.NDArray[Any]


class CacheSizes(Protocol):
    """One attention's cache, as graphs and device files describe it: KV heads, sizes of a head, element type."""

    @property
    def heads(self) -> int: ...

    @property
    def key_dim(self) -> int: ...

    @property
    def value_dim(self) -> int: ...

    @property
    def dtype(self) -> str: ...


def token_bytes(caches: Iterable[CacheSizes], itemsize: Callable[[str], int]) -> int:
    """Bytes that a token takes in the caches of one rank.

    Args:
        caches: One for every attention.
        itemsize: Bytes of an element type, by its name.
    """
    return sum(cache.heads * (cache.key_dim + cache.value_dim) * itemsize(cache.dtype) for cache in caches)


def require_batch(batch: int, capacity: int, limit: int | None) -> None:
    """Make sure that there can be a batch.

    Args:
        batch: Number of sequences.
        capacity: Most tokens of a sequence.
        limit: The longest sequence that the model takes; None if nothing bounds it.

    Raises:
        UsageError: A size is not positive, or the model takes fewer tokens.
    """
    if batch < 1 or capacity < 1:
        raise UsageError(f"a batch of {batch} with room for {capacity} tokens is none; both must be at least 1")
    if limit is not None and capacity > limit:
        raise UsageError(f"room for {capacity} tokens was asked for; the model takes at most {limit}")


def require_prompts(ids: Array, lengths: Array, batch: int) -> None:
    """Make sure that prompts are what a batch takes.

    Args:
        ids: Whole numbers [batch, tokens], padded on the right.
        lengths: How many of them count, [batch].
        batch: Number of sequences.

    Raises:
        UsageError: The shapes are wrong, or a length is not that of a prompt.
    """
    if ids.ndim != 2 or ids.shape[0] != batch or lengths.shape != (batch,):
        raise UsageError(f"expected token ids [{batch}, tokens] and {batch} lengths, got {list(ids.shape)}")
    if np.min(lengths) < 1 or np.max(lengths) > ids.shape[1]:
        raise UsageError(f"every sequence must bring 1 to {ids.shape[1]} tokens, got {lengths.tolist()}")


def require_tokens(rows: Iterable[Iterable[int]], vocabulary: int | None) -> None:
    """Make sure that token ids are the model's.

    Args:
        rows: Token ids of every sequence.
        vocabulary: How many tokens the model has; None if nobody knows.

    Raises:
        UsageError: One is not.
    """
    for token in (token for row in rows for token in row):
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            has = f"; the model has the tokens 0 to {vocabulary - 1}" if vocabulary is not None else ""
            raise UsageError(f"there is no token {token}{has}")


def require_space(tokens: int, capacity: int) -> None:
    """Make sure that a cache is not full.

    Raises:
        UsageError: It holds fewer tokens than are needed.
    """
    if tokens > capacity:
        raise UsageError(
            f"the KV cache is full: it holds {capacity} tokens and {tokens} are needed; "
            "ask for fewer new tokens or a larger capacity"
        )


def cut_of(tokens: int, split_from: int | None) -> int:
    """How many of the tokens that are read at a time the first of two halves has; 0 if they are read at once.

    Args:
        tokens: How many there are.
        split_from: The fewest that are read as two halves; None if none are.
    """
    return tokens // 2 if split_from is not None and tokens >= split_from else 0


def require_memory(cache_bytes: int, capacity: int, memory: int | None = None) -> None:
    """Make sure that the caches of one rank are not larger than all the memory there is.

    A processor's memory is handed out before it is there.

    Args:
        cache_bytes: Their bytes.
        capacity: Tokens that they are for, for the message.
        memory: Bytes of the device; None takes this machine's.

    Raises:
        UsageError: They are.
    """
    if memory is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cache_bytes > memory:
        raise UsageError(
            f"room for {capacity:,} tokens takes {cache_bytes / 1e9:,.1f} GB on every rank, the device has "
            f"{memory / 1e9:,.1f} GB; ask for fewer new tokens (--max-new-tokens) or less context (--max-context)"
        )
