"""The progress bar of a training run: steps, tokens/s, the objective now, and on the held-out text."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn

from kraken_compiler.standard_streams import tell
from kraken_compiler.text import number_text

if TYPE_CHECKING:
    from kraken_compiler.training.watch import StepRecord


class TrainingBar:
    """Shows a run on standard error; a line per evaluation if that is no terminal."""

    def __init__(self, title: str, objective: str, quiet: bool) -> None:
        """Prepare to show a run.

        Args:
            title: What is done, in a word.
            objective: What is made small, as people call it.
            quiet: Show nothing.
        """
        self._title, self._objective, self._quiet = title, objective, quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._step = 0
        self._steps: int | None = None
        self._held_out = ""
        self._now = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def stepped(self, record: StepRecord) -> None:
        """See `Watch.stepped`."""
        self._now = f"{record.tokens_per_second:.0f} tokens/s  {self._objective} {number_text(record.loss, '.3g')}"
        self._step, self._steps = record.step, record.steps
        self._show()

    def evaluating(self, done: int, total: int) -> None:
        """See `Watch.evaluating`."""
        self._now = f"evaluating {done:,} of {total:,} tokens"
        self._show()

    def evaluated(self, step: int, loss: float) -> None:
        """See `Watch.evaluated`."""
        self._held_out = f"held out {number_text(loss, '.3g')}"
        self._show()
        if not self._quiet:
            line = f"step {step}: {self._objective} on the held-out text {number_text(loss, '.4g')}"
            # The bar has to step aside, where there is one.
            self._console.print(line, highlight=False) if self._console.is_terminal else tell(line)
        if step and step == (self._steps or step):
            # The last one; what comes now has a bar of its own.
            self._stop()

    def _show(self) -> None:
        if self._quiet or not self._console.is_terminal:
            return
        if self._bar is None:
            columns = (
                TextColumn(self._title),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                RemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=self._console, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        description = f"{self._now}  {self._held_out}"
        self._bar.update(self._task, description=description, completed=self._step, total=self._steps)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
