"""Finds forms for a model's layers that keep to a budget on text, every candidate calibrated and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kraken_compiler.ir.forms import KRAKEN, SYNC_DROP
from kraken_compiler.ir.program import LaneProgram, Split
from kraken_compiler.lanes.logits import inputs_function, lane_logits, recorded
from kraken_compiler.lanes.reference import ReadLane, read_from_source
from kraken_compiler.passes.lower import lower_split
from kraken_compiler.progress import Progress
from kraken_compiler.quality.budget import Budget, Choice, Payloads, choose_forms
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.calibration.rows import calibration_text
from kraken_compiler.quality.calibration.single_layers import SingleLayers
from kraken_compiler.quality.evaluate import Quality, evaluate
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
    budget: Budget,
    show: Progress,
    cache: Path | None = None,
) -> Choice:
    """Search for the forms that wait for the least communication within a budget.

    The search calibrates on most of what the calibration of the result will see and measures on the rest of that; the
    parts of the text that the result is measured on stay unseen.

    Args:
        captured: The source model.
        split: Its program, split over the lanes.
        paths: Text files, and directories of them.
        tokens: How many tokens to calibrate on.
        budget: The limit.
        show: Is told how far it is.
        cache: A file that remembers what forms cost in single layers.

    Raises:
        UsageError: The model reads no text, or the texts are too short.
        InputFileError: A text or the cache cannot be read.
    """
    rows = _rows(captured, paths, tokens)
    standard = lower_split(split, "standard", cached=False)
    read_lane = read_from_source(standard, captured.store.read)
    inputs = list(map(inputs_function(standard.inputs), rows.batches))
    costs = _costs_of_layers(captured, split, standard, read_lane, inputs, rows, show, cache)
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    source_logits = [source(ids) for ids in rows.evaluation_batches]

    def measure(forms: tuple[str, ...]) -> Quality:
        program = lower_split(split, forms, cached=False)
        count = len(layers_of(forms))
        with show.steps(f"{count} layers changed: calibrate") as advance:
            calibration = calibrate(standard, program, read_lane, inputs, rows.batch_is_held_out, advance=advance)
        return evaluate(
            recorded(source_logits),
            lane_logits(program, calibration.weights.read_lane),
            rows.evaluation_batches,
            rows.name,
        )

    return choose_forms(standard.layers.branches, costs, measure, budget, Payloads.of(standard.plan))


@dataclass(frozen=True)
class _Rows:
    """Token ids that a search reads.

    Attributes:
        batches: Token ids to calibrate on.
        batch_is_held_out: See `calibrate`.
        evaluation_batches: Token ids to measure on.
        name: What they are, for the record.
    """

    batches: list[Tensor]
    batch_is_held_out: list[bool]
    evaluation_batches: list[Tensor]
    name: str


def _rows(captured: Capture, paths: Sequence[Path], tokens: int) -> _Rows:
    """Divide the rows that the result is calibrated on: the last long ones are evaluated, the others are fitted."""
    text = calibration_text(captured, paths, tokens)
    row = text.fitted[0].shape[1]
    rows = torch.cat([ids for ids in text.fitted if ids.shape[1] == row])
    short = [ids for ids in text.fitted if ids.shape[1] != row]
    count = min(_MOST_EVALUATION_ROWS, max(1, len(rows) // 6))
    batches = [*torch.split(rows[:-count], 2 * _ROWS_AT_ONCE), *short]
    batch_is_held_out = [False] * len(batches) + [True] * len(text.held_out)
    name = f"a part of {', '.join(map(str, paths))}"
    return _Rows([*batches, *text.held_out], batch_is_held_out, list(torch.split(rows[-count:], _ROWS_AT_ONCE)), name)


def _costs_of_layers(
    captured: Capture,
    split: Split,
    standard: LaneProgram,
    read_lane: ReadLane,
    inputs: Sequence[list[Tensor]],
    rows: _Rows,
    show: Progress,
    cache: Path | None,
) -> dict[str, list[float]]:
    """Measure, by form, the costs in every layer alone, calibrated for that."""
    few = _few(rows.batches, rows.batch_is_held_out)
    batch_is_held_out = [rows.batch_is_held_out[at] for at in few]
    single = SingleLayers(split, standard, read_lane, [inputs[at] for at in few], batch_is_held_out)
    order = single.in_order()
    forms = (KRAKEN.name, SYNC_DROP.name)
    with show.steps("cost of single layers") as advance:
        alone = measure_sensitivity(
            captured,
            split,
            [(form, (layer, layer)) for form in forms for layer in order],
            rows.evaluation_batches[:1],
            rows.name,
            calibrated=single.tokens,
            reader=single.reader,
            cache=cache,
            advance=advance,
        )
    return {form: [alone.cost(form, layer) for layer in sorted(order)] for form in forms}


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
