"""Assignments for tests."""

from __future__ import annotations

import random
from itertools import pairwise

from kraken_compiler.ir.program import Split
from kraken_compiler.ir.shards import Assignment
from kraken_compiler.passes.shard.assign_lanes import Units, units_of


def units(planned: Split) -> dict[int, Units | str]:
    """The units of every branch, or why it has none."""
    pairs = zip(planned.layers.branches, planned.shards, strict=True)
    return {branch.index: units_of(branch, plan) for branch, plan in pairs}


def random_lanes(planned: Split, seed: int = 0) -> Assignment:
    """Random lanes for all units, but for the last one, which stays with a lane that has the most."""
    assignment = {}
    for number, found in units(planned).items():
        if isinstance(found, Units):
            order = list(range(found.count - 1))
            random.Random(seed + number).shuffle(order)
            order.append(found.count - 1)
            cuts = [sum(map(len, found.lanes[:lane])) for lane in range(len(found.lanes) + 1)]
            assignment[number] = tuple(tuple(sorted(order[start:stop])) for start, stop in pairwise(cuts))
    return assignment
