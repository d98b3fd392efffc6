"""What all commands share: standard error for people, standard output for results, errors as exit codes."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kraken_compiler.errors import KrakenError
from kraken_compiler.formatting import json_text
from kraken_compiler.progress import Advance

EXIT_CODES = "Exit codes: 0 done, 2 usage, 3 unsupported model, 4 verification failed, 5 bad artifact or input file."

_SECONDS_BETWEEN_LINES = 60.0


class ConsoleProgress:
    """Progress bars on standard error; a line per stage if that is no terminal, and one a minute for steps."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self._bars(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bars:
            bars.add_task(name, total=None)
            started = time.perf_counter()
            yield
        self._done(name, started)

    @contextmanager
    def steps(self, name: str) -> Iterator[Advance]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with self._bars(*columns) as bars:
            task = bars.add_task(name, total=None)
            started = told = time.perf_counter()

            def advance(done: int, total: int, unit: str) -> None:
                nonlocal told
                bars.update(task, completed=done, total=total)
                now = time.perf_counter()
                if bars.disable and not self._quiet and now - told >= _SECONDS_BETWEEN_LINES:
                    told = now
                    self._console.print(f"{name}: {done} of {total}, {now - started:.0f} s", highlight=False)

            yield advance
        self._done(name, started)

    def _bars(self, *columns: Any) -> Bars:
        hidden = self._quiet or not self._console.is_terminal
        return Bars(*columns, console=self._console, transient=True, disable=hidden)

    def _done(self, name: str, started: float) -> None:
        if not self._quiet:
            self._console.print(f"{name}: {time.perf_counter() - started:.1f} s", highlight=False)


def print_lines(lines: list[str]) -> None:
    """Results for people."""
    print("\n".join(lines), flush=True)


def print_json(data: Any) -> None:
    """Results for programs: one JSON document."""
    print(json_text(data), flush=True)


def set_up_logging(verbose: bool) -> None:
    """`-v` shows what every pass did; libraries keep their remarks and bars to themselves without it."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.ERROR, format="%(message)s", force=True
    )


def set_up_interpreter() -> None:
    """For a process that makes graphs in one thread while others hash, read and write.

    A capture makes millions of objects that stay, and collections that look at all of them again and again, and once
    more at the end, take seconds; threads that come back from the disk wait for the interpreter up to an interval for
    every piece.
    """
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
    sys.setswitchinterval(0.0005)


@contextmanager
def errors_as_exit_codes(json_output: bool = False) -> Iterator[None]:
    """End the process with one clear line and the error's exit code."""
    try:
        yield
    except KrakenError as error:
        fail(error, json_output)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def fail(error: KrakenError, json_output: bool) -> NoReturn:
    """Report an error and exit."""
    if json_output:
        print_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code)
