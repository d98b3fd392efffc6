"""Observers of a training run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from kraken_compiler.artifact.replaceable import resolved
from kraken_compiler.errors import UsageError, os_errors_as


@dataclass(frozen=True)
class StepRecord:
    """One finished step.

    Attributes:
        step: Number of steps that are done.
        steps: How many there will be.
        loss: The objective on the step's tokens, before it changed the weights; nats per token.
        learning_rate, gradient_norm: The step's; the norm is that before clipping.
        tokens_per_second: Of this step.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


class Watch(Protocol):
    """Observer of a training run."""

    def stepped(self, record: StepRecord) -> None:
        """Called when a step is done."""
        ...

    def evaluating(self, done: int, total: int) -> None:
        """Called when so many tokens of the held-out text are done."""
        ...

    def evaluated(self, step: int, loss: float) -> None:
        """Called with the objective on the held-out text after so many steps, in nats per token."""
        ...


class SilentWatch:
    """Observer that ignores all events."""

    def stepped(self, record: StepRecord) -> None:
        pass

    def evaluating(self, done: int, total: int) -> None:
        pass

    def evaluated(self, step: int, loss: float) -> None:
        pass


class ToAll:
    """Passes every event to several observers."""

    def __init__(self, *watches: Watch) -> None:
        self._watches = watches

    def stepped(self, record: StepRecord) -> None:
        for watch in self._watches:
            watch.stepped(record)

    def evaluating(self, done: int, total: int) -> None:
        for watch in self._watches:
            watch.evaluating(done, total)

    def evaluated(self, step: int, loss: float) -> None:
        for watch in self._watches:
            watch.evaluated(step, loss)


class ToFile:
    """Writes a line of JSON for every event, for a watch in another process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def stepped(self, record: StepRecord) -> None:
        self._write("stepped", asdict(record))

    def evaluating(self, done: int, total: int) -> None:
        self._write("evaluating", {"done": done, "total": total})

    def evaluated(self, step: int, loss: float) -> None:
        self._write("evaluated", {"step": step, "loss": loss})

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"event": event, **values}) + "\n")


def pass_on(line: str, watch: Watch) -> None:
    """Pass an event that `ToFile` wrote to a watch."""
    values = json.loads(line)
    event = values.pop("event")
    if event == "stepped":
        watch.stepped(StepRecord(**values))
    elif event == "evaluating":
        watch.evaluating(**values)
    else:
        watch.evaluated(**values)


class TensorBoard:
    """Curves for TensorBoard."""

    def __init__(self, directory: Path, objective: str, first_step: int = 0) -> None:
        """Open a log.

        Args:
            directory: Where it goes.
            objective: What its curves call the objective.
            first_step: What an earlier part of the run logged from here on is dropped.

        Raises:
            UsageError: tensorboard is not installed.
            InputFileError: The directory cannot be written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"--tensorboard needs packages that are not installed: pip install 'kraken-compiler[heal]' ({error})"
            ) from error
        with os_errors_as(f"--tensorboard {directory}: cannot be written"):
            self._writer: Any = SummaryWriter(str(directory), purge_step=first_step + 1)
        self._objective = objective

    def stepped(self, record: StepRecord) -> None:
        self._writer.add_scalar(f"train/{self._objective}", record.loss, record.step)
        for name in ("learning_rate", "gradient_norm", "tokens_per_second"):
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.step)

    def evaluating(self, done: int, total: int) -> None:
        pass

    def evaluated(self, step: int, loss: float) -> None:
        self._writer.add_scalar(f"held_out/{self._objective}", loss, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def require_curves_apart(curves: Path | None, *places: Path) -> None:
    """Make sure that curves go into a directory, and not where a run keeps its state or writes its result.

    Raises:
        UsageError: They do not.
    """
    if curves is None:
        return
    target = resolved(curves)
    if target.exists() and not target.is_dir():
        raise UsageError(f"--tensorboard {curves}: is no directory")
    for place in map(resolved, places):
        if place in (target, *target.parents):
            raise UsageError(f"--tensorboard {curves}: lies in {place}, which the run writes; choose another directory")


@contextmanager
def watching(watch: Watch | None, curves: Path | None, objective: str, first_step: int) -> Iterator[Watch]:
    """All that observe a run: the caller's, and TensorBoard if it was asked for, whose log is closed at the end.

    Args:
        watch: The caller's.
        curves: Directory of the log.
        objective, first_step: See `TensorBoard`.

    Raises:
        UsageError, InputFileError: See `TensorBoard`.
    """
    own = () if watch is None else (watch,)
    if curves is None:
        yield ToAll(*own)
        return
    board = TensorBoard(curves, objective, first_step)
    try:
        yield ToAll(*own, board)
    finally:
        board.close()
