"""The runner: it alone times, logs, lints, recompiles, refreshes shapes, dumps graphs, and stops at rejections."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from kraken_compiler.errors import InputFileError, Rejection, UnsupportedModelError
from kraken_compiler.ir.printer import program_text
from kraken_compiler.ir.program import LaneProgram, Program
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.shapes import refresh_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """One line of a compile's history."""

    name: str
    matches: int
    nodes: int
    seconds: float


@dataclass
class PassRunner:
    """Runs the passes of one compile, stage after stage.

    Attributes:
        dump_directory: Where to write the graph as text after every pass.
        progress: Called with each pass's name before it runs.
        history: One record for every pass so far.
        near: What passes so far have nearly matched, and why they did not.
        checks: Whether every program is checked after every pass, as tests do.
    """

    checks: ClassVar[bool] = False

    dump_directory: Path | None = None
    progress: Callable[[str], None] | None = None
    history: list[PassRecord] = field(default_factory=list)
    near: list[Rejection] = field(default_factory=list)

    def run(self, program: Program, pipeline: Sequence[Pass[Any]]) -> Program:
        """Run `pipeline` over `program`, whose graph and tables are changed.

        Returns:
            The program at the stage to which the passes lead.

        Raises:
            UnsupportedModelError: A pass rejected a part of the model.
            InputFileError: The dump directory cannot be written.
        """
        for step in pipeline:
            program = self._run(program, step)
        # Once, for the passes work on the graph and only its users run the code.
        program.module.recompile()
        return program

    def _run(self, program: Program, step: Pass[Any]) -> Program:
        stage = type(program).__name__
        assert isinstance(program, step.requires), f"pass '{step.name}' needs a {step.requires.__name__}, not a {stage}"
        if self.progress is not None:
            self.progress(step.name)
        start_time = time.perf_counter()
        result = step.run(program)
        if result.rejections:
            raise UnsupportedModelError(tuple(map(self._explained, result.rejections)))
        self.near += result.near
        program = result.program or program
        program.graph.eliminate_dead_code()
        program.graph.lint()
        refresh_shapes(program.graph)
        if self.checks:
            program.check()
        record = PassRecord(step.name, result.matches, len(program.graph.nodes), time.perf_counter() - start_time)
        logger.info("%-22s %5d matches %6d nodes %7.2f s", *vars(record).values())
        for reason, misses in _by_reason(result.near).items():
            place = f"node {misses[0].nodes[0]} of module '{misses[0].path}'"
            logger.info("  nearly %d more, the first at %s: %s", len(misses), place, reason)
        if self.dump_directory is not None:
            _dump(program, self.dump_directory / f"{len(self.history):02d}-{step.name}.txt")
        self.history.append(record)
        return program

    def _explained(self, rejection: Rejection) -> Rejection:
        """A rejection with the reason for which an earlier pass has left its node as it is."""
        near = next((near for near in self.near if not set(near.nodes).isdisjoint(rejection.nodes)), None)
        return rejection if near is None else replace(rejection, reason=f"{rejection.reason}: {near.reason}")


def _by_reason(near: Sequence[Rejection]) -> dict[str, list[Rejection]]:
    by_reason: dict[str, list[Rejection]] = {}
    for rejection in near:
        by_reason.setdefault(rejection.reason, []).append(rejection)
    return by_reason


def _graphs(program: Program) -> Iterator[Program]:
    """A program and, where it has a KV cache or runs in halves, the graphs for that."""
    yield program
    if isinstance(program, LaneProgram) and program.cached is not None:
        yield from (program.cached.tables, program.cached.step)
        if program.cached.split is not None:
            yield program.cached.split.program
    if isinstance(program, LaneProgram) and program.rows is not None:
        yield program.rows.program


def _dump(program: Program, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(program_text, _graphs(program))))
    except OSError as error:
        raise InputFileError(f"cannot write the graph dump {path}: {error.strerror}") from error
