"""Chooses lanes for a captured model and the forms that its layers will have.

What lanes find of what they read is a first-order measure: where parts are as large as the stream that they join, as in
a first layer, more of it may do harm. So the choice is tried on the model, some layers at a time, and those where the
order of the files loses less keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.forms import Form
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.ir.shards import LANES, Assignment
from kraken_compiler.lanes.logits import inputs_function
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.form.derive_schedule import derive_plan
from kraken_compiler.passes.lower import FormChoice, rows_of_layers
from kraken_compiler.passes.sample_inputs import all_sizes, position_limit, sample_inputs
from kraken_compiler.passes.shapes import shape_of
from kraken_compiler.passes.shard.assign_lanes import Units, units_of
from kraken_compiler.passes.stages import cut, schedule
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.assignment.choose import Lanes, Reading, choose_lanes, units_of_lanes
from kraken_compiler.quality.assignment.reads import measure_reads, withheld
from kraken_compiler.quality.calibration.rows import calibration_text
from kraken_compiler.training.loss import distillation_loss

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_TEXT_TOKENS = 4096
_RANDOM_SIZES = ((4, 128), (4, 64), (2, 64), (2, 32), (2, 16), (1, 16))
"""Batch and sequence of random inputs: the first that the model's rules allow."""
_MOST_WORSE = 1.25
"""What lanes may cost before calibration if one follows: layers 4 to 15 of SmolLM2 cost 12 % more then and 6 % less
after it. Where more of what is read does harm, in a first layer, KL doubles."""

_MOST_COMPARED = 1 << 26
"""Elements of outputs that are compared with the source's."""


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
        notes: What was found, for people; nothing before, and if there was nothing to choose.
    """

    captured: Capture
    form: FormChoice
    layers: str | Sequence[int] | None = None
    paths: Sequence[Path] = ()
    tokens: int = 0
    show: Progress = field(default_factory=Silent)
    notes: tuple[str, ...] = ()

    def __call__(self, planned: Split) -> Assignment:
        """The lanes of every branch for which it matters."""
        forms = rows_of_layers(self.form, self.layers, len(planned.layers.layers))
        wanted = withheld(derive_plan(planned.layers.branches, forms))
        units = _units(planned)
        if not wanted or not any(one.count > len(one.lanes) for one in units.values()):
            return {}
        read_lane = read_from_source(planned, self.captured.store.read)
        batches = self._batches(planned)
        with self.show.steps("choose lanes") as advance:
            reads = measure_reads(planned, units, wanted, read_lane, batches, advance)
        if not reads:
            return {}
        reading = Reading(reads, units)
        with self.show.stage("try lanes"):
            trial = _Trial(self.captured, planned, forms, batches, units)
            lanes = _tried(reading, trial, _MOST_WORSE if self.paths else 1.0)
        before, after = reading.found(reading.in_order()), reading.found(lanes)
        self.notes = (
            f"lanes find {after:.0%} of what they read late of each other on themselves ({before:.0%} in the order "
            f"of the files); {trial.measure} before calibration {trial.of(reading.in_order()):.3g} -> "
            f"{trial.of(lanes):.3g}",
        )
        return trial.assignment(lanes)

    def _batches(self, planned: Split) -> list[list[Tensor]]:
        if self.paths:
            text = calibration_text(self.captured, self.paths, self.tokens)
            inputs_of = inputs_function(planned.inputs)
            every = max(1, text.rows.numel() // _TEXT_TOKENS)
            return [inputs_of(ids) for ids in torch.split(text.rows[::every], 4)]
        limit = position_limit(planned)
        sizes = (size for size in _RANDOM_SIZES if size[1] <= limit and all_sizes(planned, *size) is not None)
        batch, sequence = next(sizes, _RANDOM_SIZES[-1])
        values = sample_inputs(planned, batch, sequence)
        return [[values[spec.name] for spec in planned.inputs]]


class _Trial:
    """What a form costs with some lanes: KL to the source where the model gives logits, else the relative error.

    Attributes:
        measure: Which of the two.
    """

    def __init__(
        self,
        captured: Capture,
        planned: Split,
        forms: tuple[Form, ...],
        batches: Sequence[list[Tensor]],
        units: dict[int, Units],
    ) -> None:
        heads = [node for node in planned.graph.nodes if node.name == planned.layers.head]
        self._vocabulary = shape_of(heads[0])[-1] if heads else None
        self.measure = "relative error" if self._vocabulary is None else "KL"
        self._captured, self._planned, self._forms, self._units = captured, planned, forms, units
        self._batches: list[list[Tensor]] = []
        self._expected: list[tuple[Tensor, ...]] = []
        self._costs: dict[bytes, float] = {}
        compared = 0
        for inputs in batches:
            if self._expected and compared + compared // len(self._expected) > _MOST_COMPARED:
                break
            self._batches.append(inputs)
            self._expected.append(self._outputs(planned, inputs))
            compared += sum(output.numel() for output in self._expected[-1])

    def assignment(self, lanes: Lanes) -> Assignment:
        """Lanes as the split takes them, without those in the order of the files."""
        found = {number: units_of_lanes(one, len(self._units[number].lanes)) for number, one in lanes.items()}
        return {number: one for number, one in found.items() if one != self._units[number].lanes}

    def groups(self, numbers: Sequence[int]) -> Iterator[set[int]]:
        """Branches by layers, of which later groups have more: the first layer, the second, two, four, ..."""
        layer_of = {branch.index: branch.layer for branch in self._planned.layers.branches}
        layers = sorted({layer_of[number] for number in numbers})
        start, size = 0, 1
        while start < len(layers):
            group = layers[start : start + size]
            yield {number for number in numbers if layer_of[number] in group}
            start, size = start + size, max(1, start + size)

    def of(self, lanes: Lanes) -> float:
        """The cost."""
        key = b"".join(lanes[number].tobytes() for number in sorted(lanes))
        if key not in self._costs:
            program = schedule(cut(self._planned, self.assignment(lanes)), self._forms)
            pairs = zip(self._batches, self._expected, strict=True)
            costs = [self._difference(self._outputs(program, inputs), expected) for inputs, expected in pairs]
            self._costs[key] = sum(costs) / len(costs)
        return self._costs[key]

    def _outputs(self, program: Program, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        read_lane = read_from_source(program, self._captured.store.read)
        outputs = StreamingProgram(program, read_lane).run_flat(inputs)
        if self._vocabulary is not None:
            return tuple(output for output in outputs if output.dim() and output.shape[-1] == self._vocabulary)
        return tuple(output for output in outputs if output.is_floating_point())

    def _difference(self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
        total = 0.0
        for one, other in zip(found, expected, strict=True):
            one, other = one.float(), other.float()
            if self.measure == "KL":
                student_TV, teacher_TV = one.flatten(0, -2), other.flatten(0, -2)
                total += float(distillation_loss(student_TV, teacher_TV)) / len(student_TV)
            else:
                total += float((one - other).pow(2).sum() / other.pow(2).sum().clamp_min(1e-12))
        return total / max(1, len(found))


def _tried(reading: Reading, trial: _Trial, most: float) -> Lanes:
    """The chosen lanes but in groups of layers in which they cost `most` times what the order of the files does."""
    lanes, chosen = reading.in_order(), choose_lanes(reading)
    kept: set[int] = set()
    for group in trial.groups(reading.branches):
        candidate = {number: chosen[number] if number in group else one for number, one in lanes.items()}
        if trial.of(candidate) < most * trial.of(lanes):
            lanes = candidate
        else:
            kept |= group
            chosen = choose_lanes(reading, kept)
    return lanes


def _units(planned: Split) -> dict[int, Units]:
    """The units of the branches that may take other lanes; weights that several branches read keep their order."""
    nodes = {node.name: node for node in planned.graph.nodes}
    readers: dict[str, set[int]] = {}
    for branch, plan in zip(planned.layers.branches, planned.shards, strict=True):
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
