"""Kept sets: which part of every tensor inside a branch is computed on which lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kraken_compiler.ir.index_set import IndexSet
from kraken_compiler.ir.schedule import AUTO

SPLIT, WHOLE = "split", "whole"
EMBEDDINGS = (AUTO, SPLIT, WHOLE)
"""What a lane holds of an embedding: its own rows where that saves enough memory, its own rows, or all rows."""

ORDER, AFFINITY = LANES = ("order", "affinity")
"""How lanes get their heads and columns: in the order of the files, or those together that read most of each other."""

LaneUnits = tuple[tuple[int, ...], ...]
"""Of one branch the units (FFN columns, KV heads with their query heads) of every lane, ascending."""

Assignment = Mapping[int, LaneUnits]
"""The units of lanes by number of the branch; a branch that is not among them keeps the order of the files."""

KeptDim = tuple[IndexSet, ...] | None
"""One index set per lane, or None if every lane keeps the whole dimension."""

Kept = tuple[KeptDim, ...]
"""One entry per dimension of a tensor."""


@dataclass(frozen=True)
class BranchShards:
    """The split of one branch.

    Attributes:
        branch: Number of the branch, 1-based.
        inputs: Names of the projections that are split by output column.
        output: Name of the projection that is split by input column.
        region: Names of the nodes between them, in graph order.
        kept_sets: For every tensor of the branch that is not whole on every lane: its kept sets, by node name.
            Covers the projections' outputs, the region, and what the region reads from outside.
        columns: The columns of the output projection's input that each lane computes, equally many on all lanes.
        owned: Those of them that count, the first of `columns`; the others are another lane's, and multiplied by zero.
        structure: Number of the branch's structure; branches with the same number are split alike, node by node.
    """

    branch: int
    inputs: tuple[str, ...]
    output: str
    region: tuple[str, ...]
    kept_sets: dict[str, Kept]
    columns: tuple[IndexSet, ...]
    owned: tuple[IndexSet, ...]
    structure: int = 0
