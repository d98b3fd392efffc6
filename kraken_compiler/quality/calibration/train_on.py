"""Trains calibrated lanes on the calibration's text: passes of self-distillation over all that regression has fitted.

Regression fits one branch after the other to the source's stream. What that leaves has its cause in many branches at
once, and its worth only the logits tell: KL(source || lanes) of the next-token distributions, differentiated through
all lanes. The rows are those that the regressions have fitted, so both need no more text than one of them.

Some rows that neither has read tell whether it helped; the weights stay as they were if it did not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kraken_compiler import _torch_compat as compat
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.logits import LogitsOf
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.ops.op_sets import DEQUANTIZE
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.passes.shapes import shape_of
from kraken_compiler.progress import Advance
from kraken_compiler.quality.calibration.calibrate import first_stale
from kraken_compiler.quality.calibration.lane_weights import LaneWeights
from kraken_compiler.quality.calibration.record import TrainingRecord
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.training.learning_rate import learning_rate, rows_of_step
from kraken_compiler.training.parameters import LaneParameters, is_trained
from kraken_compiler.training.settings import RunSettings
from kraken_compiler.training.trainer import DivergenceError, Trainer

_TOKENS_OF_A_STEP, _FEWEST_STEPS = 2048, 8
"""A pass over little text takes at least so many steps, of fewer tokens each."""
_LEARNING_RATE = 2e-4
_COPIES = 4
"""Of every trained weight, in float32: itself, its gradient, and AdamW's two moments."""
_STREAMS, _COLUMNS, _LOGITS = 16, 4, 3
"""Values of a token that a branch keeps, in widths of the stream and of its inside, and of its logits."""


def train_on(
    source: LogitsOf,
    program: LaneProgram,
    weights: LaneWeights,
    rows: Tensor,
    aside: Tensor,
    passes: int,
    *,
    free_memory: int,
    advance: Advance | None = None,
) -> TrainingRecord:
    """Train the weights of all branches that read something else than in the source.

    Args:
        source: The source model.
        program: The lane program.
        weights: The lanes' weights, which are changed.
        rows: Token ids to train on, int64 [rows, S].
        aside: Token ids that nothing was fitted to, int64 [rows, S].
        passes: How often every row is read.
        free_memory: Bytes that may be used.
        advance: Is told how many steps are done.
    """
    if any(node.target is DEQUANTIZE for node in program.graph.nodes):
        return TrainingRecord(0, 0, note="some weights are quantised, and integers cannot be trained")
    if not len(aside):
        return TrainingRecord(0, 0, note="the texts are too short to tell whether it helps")
    names = _late_weights(program)
    if not names:
        return TrainingRecord(0, 0, note="no branch reads something else than in the source")
    batch = max(1, min(_TOKENS_OF_A_STEP // rows.shape[1], len(rows) // _FEWEST_STEPS))
    recompute = _bytes(program, names, batch * rows.shape[1]) > free_memory
    need = _bytes(program, names, batch * rows.shape[1], recompute=recompute)
    if need > free_memory:
        note = f"it takes about {need / 1e9:.1f} GB of memory, {free_memory / 1e9:.1f} GB are free; see kraken-heal"
        return TrainingRecord(0, 0, note=note)
    settings = RunSettings(
        steps=passes * -(-len(rows) // batch),
        sequence=rows.shape[1],
        batch=batch,
        learning_rate=_LEARNING_RATE,
        precision="bfloat16" if compat.has_bfloat16_units() else "float32",
    )
    parameters = LaneParameters.of_all_lanes(program, weights.read_lane, trained=lambda spec: spec.name in names)
    objective = Distillation(_teacher(source, rows[0]))
    trainer = Trainer(LaneRunner(program, recompute=recompute), parameters, objective, settings)
    before = trainer.evaluate(aside).loss
    note, steps = "", 0
    try:
        while steps < settings.steps:
            trainer.step(rows_of_step(rows, settings, steps), learning_rate(settings, steps))
            steps += 1
            if advance is not None:
                advance(steps, settings.steps, "steps")
        after = trainer.evaluate(aside).loss
    except DivergenceError as error:
        note, after = f"{error} is not finite", math.inf
    kept = after < before
    if kept:
        for spec, value in parameters.results():
            weights.change(spec, [value] * program.degree if spec.shared else list(value))
    return TrainingRecord(steps, steps * batch * rows.shape[1], before, after, kept, note)


def _late_weights(program: LaneProgram) -> set[str]:
    """Names of the weights that branches read from the first on that does not read what it reads in the source."""
    nodes = {node.name: node for node in program.graph.nodes}
    late = program.layers.branches[first_stale(program) - 1 :]
    readers = [nodes[name] for branch in late for name in branch.nodes]
    late_names = {operand.name for node in readers for operand in node.all_input_nodes}
    # What other parts of the model read, too, stays what it is: an embedding, or a weight of an earlier layer.
    inside = {node.name for node in readers}
    return {
        name
        for name, spec in program.weights.items()
        if name in late_names and is_trained(spec) and {user.name for user in nodes[name].users} <= inside
    }


def _teacher(source: LogitsOf, row: Tensor) -> LogitsOf:
    """The source under autocast if all its operators take mixed element types, else without."""

    def without_autocast(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return source(ids)

    try:
        with torch.autocast(row.device.type, torch.bfloat16):
            source(row[None])
    except RuntimeError:  # Torch has no class of its own for operands of two types.
        return without_autocast
    return source


def _bytes(program: LaneProgram, names: set[str], tokens: int, *, recompute: bool = False) -> int:
    """Memory that training takes, about.

    Args:
        program: The lane program.
        names: The weights that are trained.
        tokens: Tokens of a step.
        recompute: Keep what goes from branch to branch only, and the inside of one branch at a time.
    """

    def numbers(specs: Iterable[WeightSpec]) -> int:
        return sum(math.prod(spec.shape) * (1 if spec.shared else program.degree) for spec in specs)

    weights = numbers(program.weights.values()) + (_COPIES - 1) * numbers(program.weights[name] for name in names)
    nodes = {node.name: node for node in program.graph.nodes}
    width = int(shape_of(nodes[program.layers.branches[0].output])[-1])
    insides = [_STREAMS * width + _COLUMNS * branch.columns for branch in program.layers.branches]
    kept = 2 * width * len(insides) + max(insides) if recompute else sum(insides)
    return 4 * (weights + tokens * (kept + _LOGITS * vocabulary(program)))
