"""Finds forms for a model's layers that keep to a budget on text, every candidate calibrated and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kraken_compiler.backends.single.streaming import read_from_source
from kraken_compiler.ir.forms import KRAKEN, SYNC_DROP
from kraken_compiler.lowering import lower
from kraken_compiler.progress import Progress
from kraken_compiler.quality.budget import Budget, Choice, Payloads, choose_forms
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.calibration.texts import calibration_text
from kraken_compiler.quality.evaluate import Quality, evaluate
from kraken_compiler.quality.lane_logits import lane_logits, replay
from kraken_compiler.quality.sensitivity import measure_sensitivity, single_layers
from kraken_compiler.runtime.logits import inputs_function

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_ROWS_AT_ONCE = 4
_MOST_MEASURED_ROWS = 16


def forms_within(
    captured: Capture,
    degree: int | None,
    paths: Sequence[Path],
    tokens: int,
    budget: Budget,
    show: Progress,
    cache: Path | None = None,
) -> Choice:
    """Search for the forms that wait for the least communication within a budget.

    The search calibrates on most of what the calibration of the result will see and measures on the rest of that; the
    parts of the text that the result is measured on stay unseen.

    Args:
        captured: The source model.
        degree: Number of lanes, see `lower`.
        paths: Text files, and directories of them.
        tokens: How many tokens to calibrate on.
        budget: The limit.
        show: Is told how far it is.
        cache: A file that remembers what forms cost in single layers.

    Raises:
        UsageError: The model reads no text, or the texts are too short.
        InputFileError: A text or the cache cannot be read.
    """
    text = calibration_text(captured, paths, tokens)
    row = text.fitted[0].shape[1]
    rows = torch.cat([ids for ids in text.fitted if ids.shape[1] == row])
    short = [ids for ids in text.fitted if ids.shape[1] != row]
    count = min(_MOST_MEASURED_ROWS, max(1, len(rows) // 6))
    fitted, measured = rows[:-count], list(torch.split(rows[-count:], _ROWS_AT_ONCE))
    standard, _ = lower(captured.program, degree, "standard", cached=False)
    assert standard.layers is not None
    assert standard.plan is not None
    layers = len(standard.layers.layers)
    wanted = [(form.name, run) for form in (KRAKEN, SYNC_DROP) for run in single_layers(layers)]
    name = f"a part of {', '.join(map(str, paths))}"
    with show.steps("cost of single layers") as advance:
        alone = measure_sensitivity(captured, standard.degree, wanted, measured[:1], name, cache=cache, advance=advance)
    costs = {form.name: [cost.kl for cost in alone.costs if cost.form == form.name] for form in (KRAKEN, SYNC_DROP)}
    read_lane = read_from_source(standard, captured.store.read)
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    said = [source(ids) for ids in measured]
    inputs_of = inputs_function(standard.inputs)
    batches = [*torch.split(fitted, 2 * _ROWS_AT_ONCE), *short, *text.held]
    held = [False] * (len(batches) - len(text.held)) + [True] * len(text.held)

    def measure(forms: tuple[str, ...]) -> Quality:
        program, _ = lower(captured.program, standard.degree, forms, cached=False)
        changed = len(layers_of(forms))
        with show.steps(f"{changed} layers changed: calibrate") as advance:
            found = calibrate(standard, program, read_lane, list(map(inputs_of, batches)), held, advance=advance)
        return evaluate(replay(said), lane_logits(program, found.weights.read_lane), measured, name)

    return choose_forms(standard.layers.branches, costs, measure, budget, Payloads.of(standard.plan))


def layers_of(forms: Sequence[str]) -> list[int]:
    """The layers that are not standard."""
    return [layer for layer, form in enumerate(forms) if form != "standard"]
