"""What every pass test does: capture a small module, run the pass, look at the graph, and compare the numbers.

sample = captured(Module(), tokens)                  # exported once, float64
check_pass(DropNoops(), sample, matches=1)           # fires, numbers hold, second run changes nothing
check_untouched(DropNoops(), sample)                 # nearly fires
golden("drop_noops", program)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kraken_compiler.capture import capture
from kraken_compiler.errors import Rejection, UnsupportedModelError
from kraken_compiler.ir.forms import Form
from kraken_compiler.ir.printer import program_text
from kraken_compiler.ir.program import LaneProgram, Program, Recognized
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.passes.pipelines import RECOGNIZE
from kraken_compiler.passes.stages import recognize, schedule, split
from tests.passes.models import VOCAB, Gpt

MakeInputs = Callable[[int, int], tuple[Tensor, ...]]
"""Inputs for a batch size and a sequence length."""


@dataclass(frozen=True)
class Sample:
    """A captured module with what it takes to run any program made from it.

    Attributes:
        module: The source, in float64.
        program: As captured; tests work on copies.
        read: Gives a source tensor by name.
        inputs: Two sets of inputs, the second of other sizes than the program was captured with.
    """

    module: nn.Module
    program: Program
    read: SourceReader
    inputs: tuple[tuple[Tensor, ...], ...]

    @cached_property
    def recognized(self) -> Recognized:
        """The program after recognition; do not change it."""
        return recognize(self.program)

    def after(self, *pipeline: Pass[Any]) -> Any:
        """A copy of the program with passes run over it."""
        known = pipeline[: len(RECOGNIZE)] == RECOGNIZE
        program = (self.recognized if known else self.program).copy()
        return PassRunner().run(program, pipeline[len(RECOGNIZE) :] if known else pipeline)

    def lanes(self, degree: int, form: Form) -> LaneProgram:
        """The lane program with one form in all layers."""
        return schedule(split(self.recognized, degree), form)

    def run(self, program: Program) -> list[Tensor]:
        """All outputs for all inputs: the plain graph at degree 1, all lanes of a lane program otherwise."""
        with torch.no_grad():
            if program.degree > 1:
                lanes = LaneModule.from_program(program, self.read)
                return [out for given in self.inputs for out in lanes.run_flat(list(given))]
            read = program.reader(self.read)
            weights = [spec.take(read(spec.source), 0) for spec in program.weights.values()]
            return [out for given in self.inputs for out in program.module(*weights, *given)]

    def expected(self) -> list[Tensor]:
        """What the source module computes."""
        with torch.no_grad():
            outputs = [self.module(*given) for given in self.inputs]
        return [out for output in outputs for out in (output if isinstance(output, tuple) else (output,))]

    def rejection(self, *pipeline: Pass[Any]) -> Rejection:
        """The one rejection that a pipeline stops with; the nodes it blames are in the graph."""
        program = self.program.copy()
        with pytest.raises(UnsupportedModelError) as caught:
            PassRunner().run(program, pipeline)
        (rejection,) = caught.value.rejections
        assert set(rejection.nodes) <= {node.name for node in program.graph.nodes}
        return rejection


def tokens(batch: int, seq: int) -> tuple[Tensor, ...]:
    """Token ids, int64 [batch, seq]."""
    return (torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(batch * 100 + seq)),)


def hidden(*widths: int, dtype: torch.dtype = torch.float64) -> MakeInputs:
    """Inputs [batch, seq, width], one per width."""

    def make(batch: int, seq: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch * 100 + seq)
        return tuple(
            torch.randn(batch, seq, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths
        )

    return make


def captured(module: nn.Module, make_inputs: MakeInputs = tokens, *, dtype: torch.dtype = torch.float64) -> Sample:
    """Export a module with seeded weights of a useful size and dynamic batch and sequence."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.4 if parameter.dim() > 1 else 0.2) + (1.0 if parameter.dim() == 1 else 0.0))
    module = module.to(dtype).eval()
    found = capture(module, example_inputs=make_inputs(2, 8))
    return Sample(module, found.program, found.store.read, (make_inputs(2, 8), make_inputs(3, 5)))


@cache
def gpt(layers: int = 1, parallel: bool = False) -> Sample:
    """The plain tiny GPT, captured once for all tests."""
    return captured(Gpt(layers, parallel=parallel))


def recognized(module: nn.Module) -> tuple[Sample, Recognized]:
    """A captured decoder and its program after recognition."""
    sample = captured(module)
    return sample, sample.recognized.copy()


def check_pass(step: Pass[Any], sample: Sample, *, matches: int, before: Sequence[Pass[Any]] = ()) -> Any:
    """The pass fires `matches` times, keeps the numbers, and finds nothing left to do.

    Returns:
        The program after the pass.
    """
    program = sample.after(*before)
    want = sample.run(program)
    assert_close(want, sample.expected())
    found, program = _after(step, program)
    assert found == matches
    assert_close(sample.run(program), want)
    check_idempotent(step, program)
    return program


def check_idempotent(step: Pass[Any], program: Program) -> None:
    """Run again, the pass changes nothing and says so."""
    text = program_text(program)
    found, program = _after(step, program)
    assert found == 0
    assert program_text(program) == text


def check_untouched(step: Pass[Any], sample: Sample, *, before: Sequence[Pass[Any]] = (), why: str = "") -> Any:
    """The pass does not fire: no match, and the same graph; where it nearly does, it says why not."""
    program = sample.after(*before)
    program.graph.eliminate_dead_code()
    text = program_text(program)
    near = step.run(program).near
    assert why in " ".join(one.reason for one in near)
    assert bool(near) == bool(why)
    found, program = _after(step, program)
    assert found == 0
    assert program_text(program) == text
    assert {name for one in near for name in one.nodes} <= {node.name for node in program.graph.nodes}
    return program


def check_analysis(step: Pass[Any], program: Program, *facts: str) -> Any:
    """An analysis leaves the graph alone and finds the same again; returns the program with what it found."""
    text = program_text(program)
    first, program = _after(step, program)
    found = [getattr(program, fact) for fact in facts]
    assert program_text(program) == text
    again, program = _after(step, program)
    assert again == first
    assert [getattr(program, fact) for fact in facts] == found
    return program


def _after(step: Pass[Any], program: Program) -> tuple[int, Any]:
    """How often a pass fired, and the program after it."""
    runner = PassRunner()
    program = runner.run(program, [step])
    return runner.history[0].matches, program


def assert_close(have: Sequence[Tensor], want: Sequence[Tensor], *, tolerance: float = 1e-9) -> None:
    """Equal shapes, types and values, tensor by tensor."""
    assert len(have) == len(want)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def targets(program: Program) -> list[str]:
    """The calls of a program, in order, e.g. "aten.linear"."""
    return [_target(node) for node in program.graph.nodes if node.op == "call_function"]


def _target(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default") if "." in str(node.target) else node.name.rstrip("_0123456789")


@dataclass(frozen=True)
class Golden:
    """Compares a program with a text on disk."""

    directory: Path
    update: bool

    def __call__(self, name: str, program: Program, *, last: int = 0) -> None:
        """Compare the program, or only its `last` lines, with `name`.txt."""
        lines = golden_text(program).splitlines(keepends=True)
        text, path = "".join(lines[-last:]), self.directory / f"{name}.txt"
        if self.update:
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: run pytest tests/passes --update-golden"
        assert text == path.read_text()


def golden_text(program: Program) -> str:
    """The program's text with symbols renamed in order of appearance: torch numbers them as it pleases."""
    names: dict[str, str] = {}
    return re.sub(r"\b[su]\d+\b", lambda match: names.setdefault(match[0], f"n{len(names)}"), program_text(program))
