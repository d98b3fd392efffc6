"""Stored tables: how long they are, and that every lane's are computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.write import tables
from kraken_compiler.backends.onnx_ort.write.tables import MAX_POSITIONS, LaneTables
from kraken_compiler.ir.program import CachedProgram, Program
from tests.test_families import lane_program, recognized

DEGREE = 2


def program_of(name: str) -> tuple[Program, CachedProgram]:
    program = lane_program(name, DEGREE, "kraken")
    assert program.cached is not None
    return program, program.cached


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("llama", MAX_POSITIONS),
        pytest.param("gpt2", 64, marks=pytest.mark.slow),
        ("plain_alibi", None),
        pytest.param("bloom", None, marks=pytest.mark.slow),
    ],
)
def test_tables_are_as_long_as_positions_reach(name: str, positions: int | None) -> None:
    program, cached = program_of(name)
    made = LaneTables(program, cached, program.reader(recognized(name).read), cached.plan.tables[1:])
    assert made.positions == positions
    assert list(made.shapes) == list(cached.plan.tables[1:])
    for again in range(2):
        for lane in range(DEGREE):
            found = made.of(lane)
            assert {one: tuple(value.shape) for one, value in found.items()} == made.shapes, (again, lane)


def test_a_compile_computes_every_lanes_tables_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's hold its transposed weights, which is nearly the model."""
    program, _ = program_of("gpt2")
    computed = []

    def counting(graph: fx.GraphModule, weights: list[Tensor], positions: int) -> tuple[Tensor, ...]:
        # Running on fake tensors, for the shapes, costs nothing.
        if not isinstance(weights[0], FakeTensor):
            computed.append(positions)
        return run(graph, weights, positions)

    run = tables._run
    monkeypatch.setattr(tables, "_run", counting)
    OnnxBackend().write(program, recognized("gpt2").read, tmp_path)
    assert computed == [64] * DEGREE
