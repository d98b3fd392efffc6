"""Finds forms for a model's layers that keep to a budget on text, every candidate calibrated and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import LaneProgram, Split
from kraken_compiler.lanes.evaluate import Quality, evaluate
from kraken_compiler.lanes.logits import inputs_function, lane_logits, recorded
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.lower import lower_split
from kraken_compiler.progress import Progress
from kraken_compiler.quality.budget import CHANGES, Budget, Choice, Payloads, SecondsOf, choose_forms, saves_nothing
from kraken_compiler.quality.calibration.on_text import fit_and_train
from kraken_compiler.quality.calibration.rows import CalibrationText, calibration_text, long_rows
from kraken_compiler.quality.calibration.single_layers import SingleLayers
from kraken_compiler.quality.sensitivity import measure_sensitivity

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_ROWS_AT_ONCE = 4
_MOST_EVALUATION_ROWS = 16
_SINGLE_LAYER_TOKENS = 8192


def forms_within(
    captured: Capture,
    split: Split,
    paths: Sequence[Path],
    tokens: int,
    passes: int,
    budget: Budget,
    show: Progress,
    cache: Path | None = None,
    seconds_of: SecondsOf | None = None,
) -> Choice:
    """Search for the forms that wait for the least communication, or take the least time, within a budget.

    The search calibrates on most of what the calibration of the result will see and measures on the rest of that; the
    parts of the text that the result is measured on stay unseen.

    Args:
        captured: The source model.
        split: Its program, split over the lanes.
        paths: Text files, and directories of them.
        tokens: How many tokens to calibrate on.
        passes: How often to train on them, see `fit_and_train`.
        budget: The limit.
        show: Is told how far it is.
        cache: A file that remembers what forms cost in single layers.
        seconds_of: Predicts times, see `choose_forms`.

    Raises:
        UsageError: The model reads no text, or the texts are too short.
        InputFileError: A text or the cache cannot be read.
    """
    standard = lower_split(split, "standard", cached=False)
    branches, payloads, layers = standard.layers.branches, Payloads.of(standard.plan), len(standard.layers.layers)
    if saves_nothing(branches, layers, payloads, seconds_of):
        # Before layers are measured for half an hour.
        seconds = None if seconds_of is None else seconds_of((STANDARD.name,) * layers)
        return Choice(str(budget), None, standard_seconds=seconds)
    text, evaluation_batches = _part_aside(calibration_text(captured, paths, tokens))
    name = f"a part of {', '.join(map(str, paths))}"
    costs = _costs_of_layers(captured, split, standard, text, evaluation_batches[0], name, show, cache)
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    source_logits = [source(ids) for ids in evaluation_batches]

    def measure(forms: tuple[str, ...]) -> Quality:
        program = lower_split(split, forms, cached=False)
        title = f"{len(layers_of(forms))} layers changed: "
        weights = fit_and_train(captured, standard, program, text, passes, show, title).weights
        return evaluate(recorded(source_logits), lane_logits(program, weights.read_lane), evaluation_batches, name)

    return choose_forms(branches, costs, measure, budget, payloads, seconds_of)


def _part_aside(text: CalibrationText) -> tuple[CalibrationText, list[Tensor]]:
    """Take the last long rows that are fitted out of a text, to measure on them.

    Raises:
        UsageError: There are too few.
    """
    rows, short = long_rows(text.fitted) if text.fitted else (torch.empty(0, 0), [])
    if len(rows) < 2:
        raise UsageError(
            f"--calibrate: a search within a budget fits some rows of text and measures on others, and there are "
            f"{len(rows)} to fit; give more text, or more --calibrate-tokens"
        )
    count = min(_MOST_EVALUATION_ROWS, max(1, len(rows) // 6))
    fitted = (*torch.split(rows[:-count], 2 * _ROWS_AT_ONCE), *short)
    return replace(text, fitted=fitted), list(torch.split(rows[-count:], _ROWS_AT_ONCE))


def _costs_of_layers(
    captured: Capture,
    split: Split,
    standard: LaneProgram,
    text: CalibrationText,
    evaluation_batch: Tensor,
    name: str,
    show: Progress,
    cache: Path | None,
) -> dict[str, list[float]]:
    """Measure, by form, the costs in every layer alone, calibrated for that."""
    batches, batch_is_held_out = text.batches, text.batch_is_held_out
    few = _few(batches, batch_is_held_out)
    inputs_of = inputs_function(standard.inputs)
    single = SingleLayers(
        split,
        standard,
        read_from_source(standard, captured.store.read),
        [inputs_of(batches[at]) for at in few],
        [batch_is_held_out[at] for at in few],
    )
    order = single.in_order()
    with show.steps("cost of single layers") as advance:
        alone = measure_sensitivity(
            captured,
            split,
            [(form, (layer, layer)) for form in CHANGES for layer in order],
            [evaluation_batch],
            name,
            calibrated=single.ids,
            reader=single.reader,
            cache=cache,
            advance=advance,
        )
    return {form: [alone.cost(form, layer) for layer in sorted(order)] for form in CHANGES}


def _few(batches: Sequence[Tensor], batch_is_held_out: Sequence[bool]) -> list[int]:
    """Places of the batches that single layers are calibrated on: every so many-th of each kind, of all texts then."""
    kinds: dict[tuple[bool, int], list[int]] = {}
    for at, ids in enumerate(batches):
        kinds.setdefault((batch_is_held_out[at], ids.shape[1]), []).append(at)
    every = max(1, sum(ids.numel() for ids in batches) // _SINGLE_LAYER_TOKENS)
    return sorted(at for of_kind in kinds.values() for at in of_kind[::every])


def layers_of(forms: Sequence[str]) -> list[int]:
    """The layers that are not standard."""
    return [layer for layer, form in enumerate(forms) if form != "standard"]
