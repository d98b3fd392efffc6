"""Measures what a lane program's form, and weights that a backend rounds, cost against the source model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Reference
from kraken_compiler.capture import Capture
from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.lanes.evaluate import Quality, evaluate
from kraken_compiler.lanes.logits import LogitsOf, lane_logits
from kraken_compiler.lanes.reference import ReadLane, read_from_source
from kraken_compiler.progress import Advance, Progress
from kraken_compiler.quality.multiple_choice import Question, measure_accuracy
from kraken_compiler.quality.sensitivity import Sensitivity, ends, measure_sensitivity, single_layers
from kraken_compiler.quality.thread_ranks import logits_in_threads
from kraken_compiler.texts.read import TextChoice, evaluation_text
from kraken_compiler.verify.verification import Verification

_MOST_BY_LAYER = 2048


def measure_quality(
    captured: Capture,
    program: Program,
    text: TextChoice,
    *,
    read_lane: ReadLane | None = None,
    rewritten: LogitsOf | None = None,
    advance: Advance | None = None,
) -> Quality | str:
    """Measure what a lane program's form costs against its source.

    Args:
        captured: The source model.
        program: The lane program.
        text: What to measure on.
        read_lane: Where the lanes' weights come from; None means the source.
        rewritten: What is measured in place of the lane program, such as the devices that were written from it.
        advance: Is told how many tokens are done.

    Returns:
        The measurement, or the reason why the model cannot be measured.
    """
    if captured.lanes is not None:
        return "no quality measurement: the lanes are the model's own, and were compared with it"
    tokens = evaluation_text(captured, text)
    if isinstance(tokens, str):
        return tokens
    tokens_done = 0

    def count(ids: int) -> None:
        nonlocal tokens_done
        tokens_done += ids
        if advance is not None:
            advance(tokens_done, max(tokens_done, tokens.expected_tokens), "tokens")

    read = captured.store.read
    source = lane_logits(captured.program, read_from_source(captured.program, read))
    rewritten = rewritten or lane_logits(program, read_lane or read_from_source(program, read))
    return evaluate(source, rewritten, tokens, tokens.name, count)


def with_quality(
    verification: Verification,
    artifact: Artifact,
    lanes: Reference,
    captured: Capture,
    text: TextChoice,
    show: Progress,
) -> Verification:
    """Measure an artifact's form, with the weights in its files if it has them, and weights that a backend rounds."""
    with show.steps("quality") as advance:
        quality = measure_quality(captured, lanes.program, text, read_lane=lanes.read_lane, advance=advance)
    if isinstance(quality, str):
        return replace(verification, skipped=(*verification.skipped, quality))
    verification = replace(verification, quality=quality)
    for check in verification.checks:
        rounding, backend = check.backend.rounded_weights, check.backend
        if rounding is None:
            continue
        if backend.cannot_run:
            reason = f"no quality measurement of the {rounding} weights: this runtime does not run the devices"
            verification = replace(verification, skipped=(*verification.skipped, reason))
            continue
        with show.steps(f"quality with {rounding} weights") as advance:
            rewritten = logits_in_threads(artifact, backend)
            rounded_quality = measure_quality(captured, lanes.program, text, rewritten=rewritten, advance=advance)
        assert not isinstance(rounded_quality, str), "the same tokens were measured before"
        verification = replace(verification, rounded={**verification.rounded, rounding: rounded_quality})
    return verification


def with_accuracies(
    verification: Verification,
    lanes: Reference,
    captured: Capture,
    question_sets: Sequence[tuple[str, Sequence[Question]]],
    show: Progress,
) -> Verification:
    """Answer multiple-choice questions, by the name of their file, with the lanes and with their source."""
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    rewritten = lane_logits(lanes.program, lanes.read_lane)
    accuracies = []
    for name, questions in question_sets:
        with show.steps(f"questions of {name}") as advance:
            accuracies.append(measure_accuracy(captured, questions, name, source, rewritten, advance=advance))
    return replace(verification, accuracies=tuple(accuracies))


def sensitivity_of(
    captured: Capture, split: Split, forms: Sequence[str], layers: int, text: TextChoice, cache: Path, show: Progress
) -> Sensitivity | str:
    """Measure what forms cost in every layer alone, and from every layer to the end.

    Args:
        captured: The source model.
        split: Its program, split over the lanes.
        forms: Names of the forms, each as often as you like.
        layers: How many the model has.
        text: What to measure on; no more than some thousand tokens of it are read.
        cache: A file that remembers what was measured.
        show: Is told how far it is.

    Returns:
        The costs, or the reason why there are none.
    """
    changed_forms = [form for form in dict.fromkeys(forms) if form != STANDARD.name]
    if not changed_forms:
        return "no costs by layer: no layer's form is changed"
    tokens = evaluation_text(captured, replace(text, limit=min(text.limit or _MOST_BY_LAYER, _MOST_BY_LAYER)))
    if isinstance(tokens, str):
        return tokens
    runs = [*single_layers(layers), *ends(layers)]
    form_runs = [(form, run) for form in changed_forms for run in runs]
    with show.steps("cost of layers") as advance:
        return measure_sensitivity(captured, split, form_runs, list(tokens), tokens.name, cache=cache, advance=advance)
