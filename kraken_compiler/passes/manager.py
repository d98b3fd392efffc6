"""The runner: it alone times, logs, lints, recompiles, refreshes shapes, dumps graphs, and stops at rejections."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kraken_compiler.errors import InputFileError, UnsupportedModelError
from kraken_compiler.ir.printer import program_text
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.base import Pass
from kraken_compiler.passes.shapes import refresh_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """One line of a compile's history."""

    name: str
    matches: int
    nodes: int
    seconds: float


def run_passes(
    program: Program,
    pipeline: Sequence[Pass],
    *,
    dump_directory: Path | None = None,
    progress: Callable[[str], None] | None = None,
    first_number: int = 0,
) -> tuple[PassRecord, ...]:
    """Run `pipeline` over `program` in place.

    Args:
        program: The program to change.
        pipeline: The passes, in order.
        dump_directory: Where to write the graph as text after every pass.
        progress: Called with each pass's name before it runs.
        first_number: Number of the first pass in the dumps' file names.

    Returns:
        One record per pass.

    Raises:
        UnsupportedModelError: A pass rejected a part of the model.
        InputFileError: The dump directory cannot be written.
    """
    history = []
    for number, step in enumerate(pipeline, first_number):
        for fact in step.requires:
            assert getattr(program, fact), f"pass '{step.name}' needs '{fact}', which no earlier pass set"
        if progress is not None:
            progress(step.name)
        started = time.perf_counter()
        result = step.run(program)
        if result.rejections:
            raise UnsupportedModelError(result.rejections)
        program.graph.eliminate_dead_code()
        program.graph.lint()
        refresh_shapes(program.graph)
        for fact in step.ensures:
            assert getattr(program, fact), f"pass '{step.name}' promised '{fact}' and did not set it"
        record = PassRecord(step.name, result.matches, len(program.graph.nodes), time.perf_counter() - started)
        logger.info("%-22s %5d matches %6d nodes %7.2f s", *vars(record).values())
        history.append(record)
        if dump_directory is not None:
            _dump(program, dump_directory / f"{number:02d}-{step.name}.txt")
    # Once, for the passes work on the graph and only its users run the code.
    program.module.recompile()
    return tuple(history)


def _dump(program: Program, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(program_text(program))
    except OSError as error:
        raise InputFileError(f"cannot write the graph dump {path}: {error.strerror}") from error
