"""Calibrates a captured model's lane program on text files and measures its quality before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from torch import Tensor

from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.lanes.logits import inputs_function, lane_logits
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.progress import Progress
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.calibration.record import Calibration
from kraken_compiler.quality.calibration.rows import CalibrationText, calibration_text
from kraken_compiler.quality.calibration.train_on import train_on
from kraken_compiler.texts.read import TextChoice, TokenText, evaluation_text

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture


def calibrate_on_text(
    captured: Capture,
    standard: LaneProgram,
    program: LaneProgram,
    paths: Sequence[Path],
    tokens: int,
    passes: int,
    other_choice: TextChoice,
    show: Progress,
) -> Calibration:
    """Calibrate on text files; measure before and after on parts of them that stay unseen, and on another text.

    Args:
        captured: The source model.
        standard: It, split over the lanes in `standard` form.
        program: The lane program.
        paths: Text files, and directories of them.
        tokens: How many tokens to calibrate on.
        passes: How often to train on them, see `fit_and_train`.
        other_choice: The other text.
        show: Is told how far it is.

    Raises:
        UsageError: The model reads no text, or the texts are too short.
        InputFileError: A text cannot be read.
    """
    text = calibration_text(captured, paths, tokens)
    other = evaluation_text(captured, other_choice)
    calibration = fit_and_train(captured, standard, program, text, passes, show)
    read_lane = read_from_source(program, captured.store.read)
    qualities = []
    evaluation_texts: list[tuple[str, Iterable[Tensor]]] = [("unseen parts of the calibration text", text.unseen)]
    if isinstance(other, TokenText):
        evaluation_texts.append((other.name, other))
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    with show.stage("quality before and after calibration"):
        for name, batches in evaluation_texts:
            lanes = (lane_logits(program, weights) for weights in (read_lane, calibration.weights.read_lane))
            before, after = (evaluate(source, logits, batches, name) for logits in lanes)
            qualities.append((before, after))
    return replace(calibration, texts=tuple(map(str, paths)), qualities=tuple(qualities))


def fit_and_train(
    captured: Capture,
    standard: LaneProgram,
    program: LaneProgram,
    text: CalibrationText,
    passes: int,
    show: Progress,
    title: str = "",
) -> Calibration:
    """Refit the lanes branch by branch, then train them end to end on the same rows.

    Args:
        captured: The source model.
        standard: It, split over the lanes in `standard` form.
        program: The lane program.
        text: The rows.
        passes: How often to train on them; 0 leaves it at the closed form.
        show: Is told how far it is.
        title: What is calibrated, where there are several.
    """
    read_lane = read_from_source(program, captured.store.read)
    inputs = list(map(inputs_function(program.inputs), text.batches))
    with show.steps(f"{title}calibrate") as advance:
        calibration = calibrate(standard, program, read_lane, inputs, text.batch_is_held_out, advance=advance)
    if not passes:
        return calibration
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    with show.steps(f"{title}train") as advance:
        training = train_on(
            source,
            program,
            calibration.weights,
            text.rows,
            text.watched,
            passes,
            free_memory=psutil.virtual_memory().available,
            advance=advance,
        )
    return replace(calibration, training=training)
