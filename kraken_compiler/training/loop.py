"""The steps of a run, from where it is to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.training.checkpoint import load_checkpoint, save_checkpoint
from kraken_compiler.training.learning_rate import learning_rate, rows_of_step
from kraken_compiler.training.objective import Measurement
from kraken_compiler.training.state import RunState
from kraken_compiler.training.trainer import DivergenceError, Trainer
from kraken_compiler.training.watch import StepRecord, Watch

Heartbeat = Callable[[str, float], None]
"""Called before work begins: what it is, and how many seconds it may take beyond what any work may."""

_FIRST_SECONDS = 600.0
_SLOWER = 20


@dataclass(frozen=True)
class Outcome:
    """What the held-out text showed.

    Attributes:
        before, after: The records of what was measured there before and after training.
        held_out: (step, objective) of every evaluation.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    held_out: tuple[tuple[int, float], ...]


def train(
    trainer: Trainer,
    rows: Tensor,
    held_out: Tensor,
    folder: Path,
    state: RunState,
    watch: Watch,
    beat: Heartbeat = lambda stage, seconds: None,
) -> Outcome:
    """Train to the end; all processes must do so together.

    Args:
        trainer: As it is before the first step; it is put where the run is.
        rows, held_out: Token ids to train and to evaluate on, int64 [rows, S].
        folder: Where checkpoints go.
        state: Where the run is.
        watch: Is told what happens.
        beat: Is told what comes next.

    Raises:
        UsageError: The training diverged; the last checkpoint is kept.
        InputFileError: A checkpoint cannot be read or written.
    """
    settings = trainer.settings
    if state.step:
        load_checkpoint(trainer, folder, state)
    record: dict[str, Any] | None = None

    def evaluate(step: int) -> dict[str, Any]:
        nonlocal state
        beat(f"evaluating after step {step}", _FIRST_SECONDS)
        measurement = _evaluate(trainer, held_out, watch, beat)
        if step and not math.isfinite(measurement.loss):
            raise _divergence_error("the loss on the held-out text", step, folder, state)
        earlier = tuple(entry for entry in state.held_out if entry[0] < step)
        state = replace(state, held_out=(*earlier, (step, measurement.loss)))
        watch.evaluated(step, measurement.loss)
        return measurement.record

    if state.before is None:
        before = evaluate(0)
        state = replace(state, before=before)
    seconds = _FIRST_SECONDS / _SLOWER
    for step in range(state.step, settings.steps):
        beat(f"at step {step + 1}", _SLOWER * seconds)
        start = time.perf_counter()
        ids = rows_of_step(rows, settings, step)
        rate = learning_rate(settings, step)
        try:
            result = trainer.step(ids, rate)
        except DivergenceError as error:
            raise _divergence_error(str(error), step + 1, folder, state) from error
        seconds = time.perf_counter() - start
        watch.stepped(
            StepRecord(step + 1, settings.steps, result.loss, rate, result.gradient_norm, ids.numel() / seconds)
        )
        last = step + 1 == settings.steps
        record = evaluate(step + 1) if last or (step + 1) % settings.evaluate_every == 0 else None
        if last or (step + 1) % settings.save_every == 0:
            beat("writing a checkpoint", _FIRST_SECONDS)
            state = save_checkpoint(trainer, folder, state, step + 1)
    assert state.before is not None
    return Outcome(state.before, record or evaluate(settings.steps), state.held_out)


def _evaluate(trainer: Trainer, held_out: Tensor, watch: Watch, beat: Heartbeat) -> Measurement:
    tokens_done = 0

    def progress(tokens: int) -> None:
        nonlocal tokens_done
        tokens_done += tokens
        beat("evaluating", _FIRST_SECONDS)
        watch.evaluating(tokens_done, held_out.numel())

    return trainer.evaluate(held_out, progress)


def _divergence_error(what: str, step: int, folder: Path, state: RunState) -> UsageError:
    checkpoint = (
        f"the checkpoint after step {state.step} is kept in {folder}" if state.step else "there is no checkpoint yet"
    )
    advice = "try a smaller --learning-rate with --restart"
    return UsageError(f"step {step}: {what} is not finite, the training diverged; {advice} ({checkpoint})")
