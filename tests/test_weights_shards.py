"""Lane shards: every lane's slice, each source read once, memory bounded by few tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import fx

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import CallSpec, Program
from kraken_compiler.ir.source_reader import SourceReader, SourceRows
from kraken_compiler.ir.weight_table import DimShard, WeightSpec, lane_weights
from kraken_compiler.weights import write_shards as shards
from kraken_compiler.weights.store import MemoryStore
from kraken_compiler.weights.write_shards import write_lane_shards

ROWS = DimShard(0, (((0, 2),), ((2, 4),), ((4, 5),)))
COLUMNS = DimShard(1, (((0, 1), (3, 4)), ((1, 3),), ((0, 2),)))


def program() -> Program:
    table = [
        WeightSpec("p_rows", "w", (5, 4), "float32", "parameter", (ROWS,)),
        WeightSpec("p_columns", "w", (5, 4), "bfloat16", "parameter", (COLUMNS,)),
        WeightSpec("p_bias", "b", (4,), "float32", "parameter", (), 1 / 3),
        WeightSpec("c_scale", "scale", (), "float64", "constant"),
    ]
    call = CallSpec((), {}, {}, "", ())
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    weights = {spec.name: spec for spec in table}
    return Program(module, weights, (), call, {"scale": torch.tensor(2.0, dtype=torch.float64)}, degree=3)


def test_shards(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5, 4), "b": torch.randn(4)}
    reads: Counter[str] = Counter()
    steps = []

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return tensors[name]

    lane_program = program()
    paths = write_lane_shards(lane_program, SourceReader(read), tmp_path, lambda *step: steps.append(step))

    assert [path.name for path in paths] == [
        *(f"lane-{lane}.safetensors" for lane in range(3)),
        "shared.safetensors",
    ]
    assert reads == {"w": 1, "b": 1}
    assert steps == [(1, 3, "w"), (2, 3, "b"), (3, 3, "scale")]
    shared = load_file(paths[3])
    assert list(shared) == ["p_bias", "c_scale"]
    for lane, path in enumerate(paths[:3]):
        expected = lane_weights(lane_program.weights, lane, lane_program.reader(MemoryStore(tensors).read))
        own = load_file(path)
        assert not own.keys() & shared.keys()
        loaded = own | shared
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            spec = lane_program.weights[name]
            assert loaded[name].dtype == spec.torch_dtype
            assert tuple(loaded[name].shape) == spec.shape
            torch.testing.assert_close(loaded[name], tensor.to(spec.torch_dtype))
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "kraken_weights": "2", "lane": str(lane)}


@pytest.mark.parametrize("rows_bytes", [1, 40, 1000])
def test_large_tensors_are_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_bytes: int) -> None:
    """What is written does not depend on it; one cut along another dim, or by halves of a file, is read whole."""
    spread = DimShard(0, (((0, 2), (6, 7)), ((3, 5),), ((0, 1), (5, 6))))  # lane 1 is padded
    by_rows = {
        "rows": WeightSpec("p_rows", "rows", (7, 4), "float32", "parameter", (spread,), 0.5),
        "both": WeightSpec("p_whole", "both", (7, 4), "float32", "parameter"),
        "whole": WeightSpec("p_bias", "whole", (9,), "bfloat16", "parameter"),
    }
    table = {
        **{spec.name: spec for spec in by_rows.values()},
        "p_part": WeightSpec("p_part", "both", (7, 4), "float64", "parameter", (spread,)),
        "p_columns": WeightSpec("p_columns", "columns", (5, 4), "float32", "parameter", (COLUMNS,)),
        "p_twice": WeightSpec("p_twice", "twice", (7, 4), "float32", "parameter", (spread,)),
        "p_again": WeightSpec("p_again", "twice", (7, 4), "float32", "parameter", (spread,), 2.0),
    }
    tensors = {spec.source: torch.randn(spec.source_shape) for spec in table.values()}
    lane_program = replace(program(), weights=table)
    read_rows = []

    def rows_of(name: str) -> SourceRows:
        def read(start: int, stop: int) -> torch.Tensor:
            read_rows.append(name)
            return tensors[name][start:stop]

        return SourceRows(tuple(tensors[name].shape), read)

    for place in ("whole", "rows"):
        (tmp_path / place).mkdir()
    expected = write_lane_shards(lane_program, MemoryStore(tensors).read, tmp_path / "whole")
    monkeypatch.setattr(shards, "READ_AHEAD_BYTES", 1)
    monkeypatch.setattr(shards, "_ROWS_BYTES", rows_bytes)
    steps: list[tuple[int, int, str]] = []
    reader = SourceReader(tensors.__getitem__, rows_of)
    found = write_lane_shards(lane_program, reader, tmp_path / "rows", lambda *step: steps.append(step))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]
    assert set(read_rows) == set(by_rows)
    assert (len(read_rows) > len(by_rows)) == (rows_bytes < 1000)
    assert steps == [
        (done, 5, name) for done, name in enumerate(("rows", "both", "whole", "columns", "twice"), start=1)
    ]
    journals = [(tmp_path / place / "shards.journal").read_text() for place in ("whole", "rows")]
    assert journals[0] == journals[1]


def test_a_source_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"weight 'w' has shape \[4, 4\], the program needs \[5, 4\]"):
        write_lane_shards(program(), SourceReader(lambda name: torch.zeros(4, 4)), tmp_path)


def test_a_source_of_another_shape_that_is_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "READ_AHEAD_BYTES", 1)
    store = MemoryStore({"w": torch.zeros(5, 4), "b": torch.zeros(5)})
    with pytest.raises(InputFileError, match=r"weight 'b' has shape \[5\], the program needs \[4\]"):
        write_lane_shards(program(), store.read, tmp_path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lane-0\.safetensors"):
        write_lane_shards(program(), SourceReader(lambda name: torch.zeros(5, 4)), tmp_path / "none")


MEMORY = """
import resource, sys, torch
from pathlib import Path
from torch import fx
from kraken_compiler.ir.program import CallSpec, Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import DimShard, WeightSpec
from kraken_compiler.weights.write_shards import write_lane_shards

size = 1 << 20
halves = DimShard(0, (((0, size // 2),), ((size // 2, size),)))
table = {f"p{i}": WeightSpec(f"p{i}", f"w{i}", (size, 4), "float32", "parameter", (halves,)) for i in range(16)}
program = Program(fx.GraphModule(torch.nn.Module(), fx.Graph()), table, (), CallSpec((), {}, {}, "", ()), degree=2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
write_lane_shards(program, SourceReader(lambda name: torch.ones(size, 4)), Path(sys.argv[1]))
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_memory_stays_around_few_tensors(tmp_path: Path) -> None:
    """16 tensors of 16 MiB: the files hold 256 MiB, the writer three tensors."""
    # Every tensor is memory of its own: what malloc keeps of those that are gone, thread by thread, is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    assert float(result.stdout) < 80
