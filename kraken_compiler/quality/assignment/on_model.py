"""Chooses lanes for a captured model and the forms that its layers will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Split
from kraken_compiler.ir.shards import LANES, Assignment
from kraken_compiler.lanes.logits import inputs_function
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.form.derive_schedule import derive_plan
from kraken_compiler.passes.lower import FormChoice, rows_of_layers
from kraken_compiler.passes.sample_inputs import all_sizes, position_limit, sample_inputs
from kraken_compiler.passes.shard.assign_lanes import Units, units_of
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.assignment.choose import Reading, choose_lanes, units_of_lanes
from kraken_compiler.quality.assignment.reads import measure_reads, withheld
from kraken_compiler.quality.calibration.rows import calibration_text

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_TEXT_TOKENS = 4096
_RANDOM_SIZES = ((4, 128), (4, 64), (2, 64), (2, 32), (2, 16), (1, 16))
"""Batch and sequence of random inputs: the first that the model's rules allow."""


def require_lanes_choice(lanes: str) -> None:
    """Refuse what is no choice with a `UsageError`."""
    if lanes not in LANES:
        raise UsageError(f"--lanes {lanes}: choose from {', '.join(LANES)}")


@dataclass
class LaneChoice:
    """Chooses lanes when a split has been planned, and remembers what came of it.

    Attributes:
        captured: The source model; it must have values.
        form, layers: The forms to come, as `lower` takes them.
        paths, tokens: Texts to run the model on, and how many tokens of them calibration will read; without any it runs
            on random inputs, which tell nearly as much.
        show: Is told how far it is.
        note: What was found, for people; "" before, and if there was nothing to choose.
    """

    captured: Capture
    form: FormChoice
    layers: str | Sequence[int] | None = None
    paths: Sequence[Path] = ()
    tokens: int = 0
    show: Progress = field(default_factory=Silent)
    note: str = ""

    def __call__(self, planned: Split) -> Assignment:
        """The lanes of every branch for which it matters."""
        forms = rows_of_layers(self.form, self.layers, len(planned.layers.layers))
        wanted = withheld(derive_plan(planned.layers.branches, forms))
        units = _units(planned)
        if not wanted or not any(one.count > len(one.lanes) for one in units.values()):
            return {}
        read_lane = read_from_source(planned, self.captured.store.read)
        with self.show.steps("choose lanes") as advance, torch.random.fork_rng(devices=[]):
            reads = measure_reads(planned, units, wanted, read_lane, self._inputs(planned), advance)
        if not reads:
            return {}
        reading = Reading(reads, units)
        lanes = choose_lanes(reading)
        before, after = reading.found(reading.in_order()), reading.found(lanes)
        self.note = (
            f"lanes find {after:.0%} of what they read late of each other on themselves ({before:.0%} in the order "
            "of the files)"
        )
        return {number: units_of_lanes(one, len(units[number].lanes)) for number, one in lanes.items()}

    def _inputs(self, planned: Split) -> list[list[Tensor]]:
        if self.paths:
            inputs_of = inputs_function(planned.inputs)
            text = calibration_text(self.captured, self.paths, self.tokens)
            row = max(ids.shape[1] for ids in text.fitted)
            rows = torch.cat([ids for ids in text.fitted if ids.shape[1] == row])
            every = max(1, len(rows) * row // _TEXT_TOKENS)
            return [inputs_of(ids) for ids in torch.split(rows[::every], 8)]
        limit = position_limit(planned)
        sizes = (size for size in _RANDOM_SIZES if size[1] <= limit and all_sizes(planned, *size) is not None)
        batch, sequence = next(sizes, _RANDOM_SIZES[-1])
        values = sample_inputs(planned, batch, sequence)
        return [[values[spec.name] for spec in planned.inputs]]


def _units(planned: Split) -> dict[int, Units]:
    """The units of the branches that may take other lanes; weights that several branches read keep their order."""
    readers: dict[str, set[int]] = {}
    for branch, plan in zip(planned.layers.branches, planned.shards, strict=True):
        nodes = {node.name: node for node in planned.graph.nodes}
        for name in (*plan.inputs, plan.output):
            for operand in nodes[name].all_input_nodes[1:]:
                readers.setdefault(operand.name, set()).add(branch.index)
    shared = {number for numbers in readers.values() if len(numbers) > 1 for number in numbers}
    found = {
        branch.index: units_of(branch, plan)
        for branch, plan in zip(planned.layers.branches, planned.shards, strict=True)
        if branch.index not in shared
    }
    return {number: units for number, units in found.items() if isinstance(units, Units)}
