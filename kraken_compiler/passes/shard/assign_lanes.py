"""Give lanes the heads and columns that were chosen for them, in place of those that lie side by side in the files.

Every branch is a sum over its *units*: FFN columns, or KV heads with their query heads. Which units share a lane is
free: the sum over lanes stays what it is, and so does the standard form. In a changed form it matters, for a lane reads
its own parts fresh (`quality/assignment/`).

The plan changes and nothing else; `SplitBranches` cuts along it and checks on numbers what it cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import IndexSet, from_indices
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.ir.shards import Assignment, BranchShards, Kept, LaneUnits
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.shard.degrees import count, spread


@dataclass(frozen=True)
class Layout:
    """How the positions of one dim belong to units: [outer, units, inner], flattened.

    Legend: fused gate and up rows of 4 columns are outer 2, inner 1; the rows of 4 heads of 8 are outer 1, inner 8.
    """

    outer: int
    units: int
    inner: int

    def positions(self, units: Sequence[int]) -> list[int]:
        """The positions of some units, in the order of the units within every outer block."""
        inner = range(self.inner)
        return [
            (block * self.units + unit) * self.inner + one
            for block in range(self.outer)
            for unit in units
            for one in inner
        ]


@dataclass(frozen=True)
class Units:
    """What of one branch may be given to any lane.

    Attributes:
        count: Number of units.
        lanes: The units that lanes have in the order of the files.
        computed: How many units every lane computes; those that own fewer compute another lane's besides.
        layouts: For every tensor of the branch that lanes have parts of, by node name, the layouts of its dims.
        columns: The layout of the output projection's input.
    """

    count: int
    lanes: LaneUnits
    computed: int
    layouts: dict[str, tuple[Layout | None, ...]]
    columns: Layout

    def computed_by(self, owned: Sequence[int]) -> tuple[int, ...]:
        """A lane's units and what it computes besides: positions stay in the order of the files."""
        more = self.computed - len(owned)
        return (*owned, *range(owned[-1] + 1, owned[-1] + 1 + more))


def units_of(branch: Branch, plan: BranchShards) -> Units | str:
    """The units of a branch, or why it has to be left in the order of the files."""
    total, degree = count(branch), len(plan.owned)
    width = branch.unit
    if branch.kind == "attention" and branch.kv_heads > 1:
        # One KV head alone lies on every lane.
        group = branch.heads // branch.kv_heads if branch.heads % branch.kv_heads == 0 else branch.heads
        width = math.lcm(width, group)
    shares = spread(total, degree, branch.unit)
    if total % width or any(bound % width for share in shares for bound in (share.start, share.owned, share.stop)):
        return "lanes share KV heads"
    owned = tuple(tuple(range(share.start // width, share.owned // width)) for share in shares)
    computed = tuple(tuple(range(share.start // width, share.stop // width)) for share in shares)
    units = total // width
    columns = _layout(plan.owned, owned, units, branch.columns)
    if columns is None or _sets(columns, computed) != plan.columns:
        return "its heads or columns lie interleaved"
    layouts: dict[str, tuple[Layout | None, ...]] = {}
    for name, kept_sets in plan.kept_sets.items():
        dims = []
        for lanes in kept_sets:
            layout = None if lanes is None else _layout(lanes, computed, units, None)
            if lanes is not None and layout is None:
                return f"the heads or columns of {name} lie interleaved"
            dims.append(layout)
        layouts[name] = tuple(dims)
    return Units(units, owned, len(computed[0]), layouts, columns)


def reassigned(plan: BranchShards, units: Units, lanes: LaneUnits) -> BranchShards:
    """The split of a branch with other units on the lanes; they must fit, see `misfit`."""
    computed = tuple(map(units.computed_by, lanes))
    kept_sets: dict[str, Kept] = {
        name: tuple(None if layout is None else _sets(layout, computed) for layout in layouts)
        for name, layouts in units.layouts.items()
    }
    return replace(plan, kept_sets=kept_sets, columns=_sets(units.columns, computed), owned=_sets(units.columns, lanes))


def misfit(units: Units | str, lanes: LaneUnits) -> str:
    """Why lanes cannot have these units, which may be an artifact's; "" if they can."""
    if isinstance(units, str):
        return units
    if [len(lane) for lane in lanes] != [len(lane) for lane in units.lanes]:
        return "lanes do not have as many heads or columns as in the order of the files"
    if sorted(unit for lane in lanes for unit in lane) != list(range(units.count)):
        return "lanes do not share its heads or columns"
    if any(lane != tuple(sorted(lane)) or units.computed_by(lane)[-1] >= units.count for lane in lanes):
        return "a lane's heads or columns are not in an order that it can be padded in"
    return ""


def _sets(layout: Layout, lanes: LaneUnits) -> tuple[IndexSet, ...]:
    return tuple(from_indices(layout.positions(lane)) for lane in lanes)


def _layout(sets: tuple[IndexSet, ...], lanes: LaneUnits, units: int, length: int | None) -> Layout | None:
    """The layout in which the lanes' units are the positions in `sets`."""
    of_unit = sum(stop - start for start, stop in sets[0]) / len(lanes[0])
    if not of_unit.is_integer():
        return None
    size = int(of_unit)
    for outer in (divisor for divisor in range(1, size + 1) if size % divisor == 0):
        layout = Layout(outer, units, size // outer)
        if _sets(layout, lanes) == sets and length in (None, size * units):
            return layout
    return None


@dataclass(frozen=True)
class AssignLanes(Pass[Split]):
    """Assign units to lanes."""

    assignment: Assignment

    name: ClassVar[str] = "assign-lanes"
    requires: ClassVar[type[Program]] = Split

    def run(self, program: Split) -> PassResult:
        if program.assignment == self.assignment:
            return PassResult()
        shards = []
        for branch, plan in zip(program.layers.branches, program.shards, strict=True):
            if (lanes := self.assignment.get(branch.index)) is not None:
                units = units_of(branch, plan)
                if reason := misfit(units, lanes):
                    hint = "Compile the model again."
                    return PassResult(rejections=(Rejection(reason, (branch.output,), branch.path, hint),))
                assert isinstance(units, Units)
                plan = reassigned(plan, units, lanes)
            shards.append(plan)
        program.shards, program.assignment = tuple(shards), self.assignment
        return PassResult(len(self.assignment))
