"""Index sets: the positions of one tensor dimension that belong to one lane, as half-open ranges."""

from __future__ import annotations

from collections.abc import Iterable

IndexSet = tuple[tuple[int, int], ...]
"""Ascending, disjoint, non-touching half-open ranges `(start, stop)`."""


def from_indices(indices: Iterable[int]) -> IndexSet:
    """Compress ascending positions into ranges: `0 1 2 7` -> `((0, 3), (7, 8))`."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def to_indices(index_set: IndexSet) -> list[int]:
    """Expand ranges into ascending positions."""
    return [index for start, stop in index_set for index in range(start, stop)]


def size(index_set: IndexSet) -> int:
    """Number of positions in the set."""
    return sum(stop - start for start, stop in index_set)


def in_units(columns: IndexSet, unit: int) -> IndexSet:
    """Columns as groups of `unit` of them; they must begin and end with one."""
    return tuple((start // unit, -(-stop // unit)) for start, stop in columns)
