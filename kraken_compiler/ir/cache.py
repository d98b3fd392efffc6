"""The caches and tables that a program with a KV cache has besides its graph."""

from __future__ import annotations

from dataclasses import dataclass

POSITIONS, SLOTS, PAST, PICKS = "positions", "slots", "past", "picks"
"""Names of the step graph's inputs that say where in the cache its tokens go and which logits are wanted."""

CUT, FIRST_SLOTS, SECOND_PAST = "cut", "first_slots", "second_past"
"""Names of the inputs that the graph on two halves has besides: how many tokens the first half has, the slots that it
sees, and what is past for the second."""

SIZES = frozenset({SLOTS, PAST, CUT, FIRST_SLOTS, SECOND_PAST})
"""The inputs of which only the length says something: they count from 0."""


@dataclass(frozen=True)
class CacheSpec:
    """The keys and values that one attention keeps on one lane, [batch, heads, capacity, dim] each.

    Attributes:
        key, value: Names of the step graph's inputs.
        heads: KV heads that the lane holds.
        key_dim, value_dim: Size of a head.
        dtype: torch dtype name.
    """

    key: str
    value: str
    heads: int
    key_dim: int
    value_dim: int
    dtype: str


@dataclass(frozen=True)
class CachePlan:
    """The cached inputs of a step graph: its caches and its tables.

    Attributes:
        caches: One per attention, in graph order.
        tables: The inputs that the tables graph computes once, in the order of its outputs.
        limit: The longest sequence that the program is right for; None if nothing bounds it.
    """

    caches: tuple[CacheSpec, ...]
    tables: tuple[str, ...]
    limit: int | None = None
