"""Whether a KV cache can be held at all: a processor's memory is handed out before it is there. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Protocol

from kraken_compiler.errors import UsageError


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


def require_room(needed: int, capacity: int, memory: int | None = None) -> None:
    """Make sure that the caches of one rank are not larger than all the memory there is.

    Args:
        needed: Their bytes.
        capacity: Tokens that they are for, for the message.
        memory: Bytes of the device; None takes this machine's.

    Raises:
        UsageError: They are.
    """
    if memory is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UsageError(
            f"room for {capacity:,} tokens takes {needed / 1e9:,.1f} GB on every rank, the device has "
            f"{memory / 1e9:,.1f} GB; ask for fewer new tokens (--max-new-tokens) or less context (--max-context)"
        )
