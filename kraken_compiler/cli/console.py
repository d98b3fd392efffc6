"""Console of all commands: standard error for people, standard output for results, errors as exit codes."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kraken_compiler.errors import InputFileError, KrakenError
from kraken_compiler.progress import Advance
from kraken_compiler.standard_streams import prepare_streams, tell, write_out
from kraken_compiler.text import json_text

if TYPE_CHECKING:
    from kraken_compiler.options.command_line import Output

EXIT_CODES = "Exit codes: 0 done, 2 usage, 3 unsupported model, 4 verification failed, 5 bad artifact or input file."

_SECONDS_BETWEEN_LINES = 60.0
_INDENT = "  "


class ConsoleProgress:
    """Progress bars on standard error; a line per stage if that is no terminal, and one a minute for steps.

    The line of a stage within another one is indented and comes before the line of the other, which counts it in.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._depth = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self._task(name):
            yield

    @contextmanager
    def steps(self, name: str) -> Iterator[Advance]:
        with self._task(name) as task:
            start = last_line = time.perf_counter()

            def advance(done: int, total: int, unit: str) -> None:
                nonlocal last_line
                self._bars.update(task, completed=done, total=total, count=f"{done}/{total}")
                now = time.perf_counter()
                if self._bars.disable and not self._quiet and now - last_line >= _SECONDS_BETWEEN_LINES:
                    last_line = now
                    tell(f"{name}: {done} of {total}, {now - start:.0f} s")

            yield advance

    @contextmanager
    def _task(self, name: str) -> Iterator[TaskID]:
        """A task with a bar while it lasts and a line when it is done; nothing of it stays if it fails."""
        indent = _INDENT * self._depth
        task = self._bars.add_task(indent + name, total=None, count="")
        if not self._depth:
            self._bars.start()
        self._depth += 1
        start = time.perf_counter()
        try:
            yield task
        finally:
            self._depth -= 1
            self._bars.remove_task(task)
            if not self._depth:
                self._bars.stop()
        if not self._quiet:
            tell(f"{indent}{name}: {time.perf_counter() - start:.1f} s")


def print_lines(lines: list[str]) -> None:
    """Print results for people."""
    write_out("\n".join(lines) + "\n")


def print_json(data: Any) -> None:
    """Print results for programs: one JSON document."""
    write_out(json_text(data) + "\n")


def set_up_logging(verbose: bool) -> None:
    """Set up logging: `-v` shows what every pass did; without it, libraries show no remarks and no bars."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.ERROR, format="%(message)s", force=True
    )


def set_up_interpreter() -> None:
    """Set the interpreter up for a process that makes graphs in one thread while others hash, read and write.

    A capture makes millions of objects that stay, and collections that look at all of them again and again, and once
    more at the end, take seconds; threads that come back from the disk wait for the interpreter up to an interval for
    every piece.
    """
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
    sys.setswitchinterval(0.0005)


@contextmanager
def around_command(output: Output) -> Iterator[bool]:
    """What every command does around its work: the log, errors as exit codes, quiet libraries.

    Args:
        output: How it was asked to write.

    Returns:
        Whether it shows no progress.
    """
    set_up_logging(output.verbose)
    with errors_as_exit_codes(output.json, output.quiet), quiet_libraries(output.verbose):
        yield output.quiet or output.json


@contextmanager
def quiet_libraries(verbose: bool) -> Iterator[None]:
    """Silence the warnings of libraries without `-v`, also those that they give when they are imported."""
    if verbose:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def errors_as_exit_codes(json_output: bool = False, quiet: bool = False) -> Iterator[None]:
    """End the process with one clear line and the error's exit code.

    Args:
        json_output: Also as a JSON document on standard output.
        quiet: Leave out what an error says beyond its first line.
    """
    try:
        yield
    except KrakenError as error:
        fail(error, json_output, quiet)
    except KeyboardInterrupt:
        tell("interrupted")
        raise SystemExit(130) from None


def fail(error: KrakenError, json_output: bool, quiet: bool = False) -> NoReturn:
    """Report an error and exit."""
    if json_output:
        with suppress(InputFileError):  # standard output may be what failed
            print_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
    tell(f"error: {_short(str(error)) if quiet else error}")
    raise SystemExit(error.exit_code)


def run_app(app: Callable[..., Any], name: str) -> None:
    """Be the entry point of a command.

    Args:
        app: A typer app.
        name: What the command is called.
    """
    prepare_streams()
    try:
        app(prog_name=name)
    except OSError as error:
        # Commands write through `write_out`; help and usage are written by typer, which knows closed pipes only.
        if _can_write_out():
            raise
        fail(InputFileError(f"standard output: cannot be written: {error.strerror or error}"), json_output=False)


def _can_write_out() -> bool:
    try:
        write_out("")
    except InputFileError:
        return False
    return True


def _short(message: str) -> str:
    first, *more = message.strip().splitlines() or [""]
    return f"{first} ({len(more)} more lines without --quiet)" if more else first
