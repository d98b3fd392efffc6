"""`transform` and `load_lanes`: the lanes of a model, or of an artifact, as a module of this process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.registry import require_lanes
from kraken_compiler.capture import Capture, Model, capture
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.ir.program import Split
from kraken_compiler.ir.schedule import AUTO
from kraken_compiler.ir.shards import AFFINITY, ORDER
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.ops.devices import device_of
from kraken_compiler.passes.lower import FormChoice, lower_native, lower_split, split_source
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.quality.assignment.on_model import LaneChoice, require_lanes_choice
from kraken_compiler.surroundings import undisturbed
from kraken_compiler.verify.against_model import compare_with_model, with_rules
from kraken_compiler.verify.report import is_exact, make_report
from kraken_compiler.verify.verification import Verification
from kraken_compiler.weights.lane_tensors import lane_tensor_reader, with_lane_tensors


def transform(
    model: Model,
    degree: int | None = None,
    form: FormChoice = "kraken",
    layers: str | Sequence[int] | None = None,
    example_inputs: ExampleInputs | None = None,
    check: bool = True,
    embedding: str = AUTO,
    lanes: str = ORDER,
) -> LaneModule:
    """Rewrite a model into N parallel lanes that run in one process.

    Args:
        model: A module, or the path of anything `kraken-compile` takes. Its weights are copied one tensor at a time.
        degree: Number of lanes; None means the number of visible accelerators if there are several, else the smallest
            valid degree above 1.
        form: A row of the forms table: "standard", "kraken", "ladder", "delayed", "sync-drop", "parallel", or a `Form`;
            or one of these for every layer.
        layers: The layers that take the form, e.g. "15-29" or [0, -1]; the others stay standard. None means all.
        example_inputs: Arguments to trace with, a tuple or a dict of tensors whose sizes are at least 2; inferred for
            Hugging Face models.
        check: Compare the lanes with the model itself on random inputs, at sizes other than the example's. What is
            compared is the standard form of the same degree; of another form, one weight at a time.
        embedding: What a lane holds of an embedding: its own rows where that saves enough memory (`auto`), its own rows
            wherever that is possible (`split`), or all of them (`whole`).
        lanes: Which heads and FFN columns share a lane of a changed form: as they lie in the files (`order`), or those
            that read most of each other when the model runs on random inputs (`affinity`; a model whose weights have no
            values keeps the order).

    Returns:
        A module with the model's call signature and output structure, on the model's device. It trains, moves between
        devices and saves. `.program` is the lane program, `.report` what was recognised and scheduled. Parameters that
        the model does not train stay frozen; it computes as in evaluation mode, without dropout, also after `train()`.

    Raises:
        UsageError: Unknown form or choice, wrong degree or layers, missing example inputs.
        UnsupportedModelError: A part of the model cannot be rewritten; names module, node and reason.
        InputFileError: A model file is missing or damaged.
        VerificationError: The lanes compute something else than the model.
    """
    require_lanes_choice(lanes)
    with undisturbed() as surroundings:
        captured = capture(model, example_inputs=example_inputs)
        runner = PassRunner()
        chooses = lanes == AFFINITY and captured.has_values and captured.lanes is None
        choice = LaneChoice(captured, form, layers) if chooses else None
        notes = (*surroundings, *captured.notes)
        if captured.lanes is not None:
            split, program = None, lower_native(captured.program, captured.lanes, degree, runner=runner)
        else:
            split = split_source(captured.program, degree, runner, embedding=embedding, assign=choice)
            notes = (*notes, *(choice.notes if choice is not None else ()))
            program = lower_split(split, form, layers, runner=runner)
        module = LaneModule.from_program(program, captured.store.read, captured.frozen)
        module.report = make_report(program, runner.history, notes)
        if check:
            module = _check(module, captured, split)
    if not isinstance(model, nn.Module):
        return module.eval()
    return module.train(model.training).to(device_of(model))


def _check(module: LaneModule, captured: Capture, split: Split | None) -> LaneModule:
    """Compare a module with its model; the one returned refuses the sizes at which the model computes otherwise."""
    start = time.perf_counter()
    program, run = module.program, None
    assert module.report is not None
    if not captured.has_values:
        module.report = module.report.with_check((), (), ("not compared with the model, which has no values",), 0.0)
        return module
    if split is None or is_exact(program):
        run = module.run_flat
    else:
        program = lower_split(split, "standard", cached=False)
    with torch.no_grad():
        check = compare_with_model(captured, program, run=run)
    Verification(check.comparisons).require_passed()
    module.program = with_rules(module.program, check.rules)
    module.report = module.report.with_check(check.comparisons, check.notes, check.skipped, time.perf_counter() - start)
    return module


def load_lanes(directory: str | os.PathLike[str]) -> LaneModule:
    """All lanes of an artifact as one module in this process, with the weights the artifact holds.

    Args:
        directory: An artifact that holds the lane program itself, as the default backend keeps it.

    Returns:
        A module as `transform` makes it.

    Raises:
        InputFileError: A file is missing or damaged.
        UsageError: The artifact does not hold it.
    """
    artifact = open_artifact(Path(directory))
    lanes = require_lanes(artifact)
    program = with_lane_tensors(lanes.program, lanes.program.weights)
    return LaneModule.from_program(
        program, lane_tensor_reader(program.weights, program.degree, lanes.read_lane, SourceReader(_no_source))
    )


def _no_source(name: str) -> Tensor:
    raise AssertionError(f"{name} is not the lanes' own")
