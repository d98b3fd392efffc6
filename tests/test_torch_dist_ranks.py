"""A rank's program on real gloo ranks: it equals the single-process module. One launch does all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.lane_files import SHARED_WEIGHTS, map_weights
from kraken_compiler.backends.load import load
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import InputFileError, RankFailedError, UsageError
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.verify.execute import execute_on_ranks
from kraken_compiler.weights.store import MemoryStore
from tests.toy_lane_program import edit_manifest, toy_program, toy_sources, write_toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("ranks")
    return write_toy(place / "two.kraken", 2), write_toy(place / "three.kraken", 3)


def test_a_rank_equals_the_single_process(artifacts: tuple[Path, Path]) -> None:
    two, three = artifacts
    ids = torch.randint(0, 50, (2, 9)).tolist()
    payload = {"two": str(two), "three": str(three), "ids": ids}
    results = run_ranks("tests.runtime_functions:check_rank_program", 3, payload)
    assert [result["rank"] for result in results] == [0, 1, 2]
    for result in results:
        differences = result["differences"]
        assert list(differences) == ["loaded", "by name", "built"] + ["pair"] * (result["rank"] < 2)
        assert max(differences.values()) < 1e-5
        size, lane = result["errors"]
        assert size == (
            "UsageError: the program has 2 lanes, the process group 3 ranks; start 2 ranks, or compile for degree 3"
        )
        assert lane.startswith(f"UsageError: rank {result['rank']} of the group must run lane {result['rank']}")


def test_execute_on_ranks(artifacts: tuple[Path, Path]) -> None:
    two, _ = artifacts
    sets = [torch.randint(0, 50, shape) for shape in ((2, 7), (1, 1), (3, 12))]
    results = execute_on_ranks(two, [{"input_ids": ids.numpy()} for ids in sets], "torch").outputs
    module = load(two)
    assert isinstance(module, LaneModule)
    assert len(results) == 2
    for rank in results:
        for ids, outputs in zip(sets, rank, strict=True):
            have = tuple(map(torch.from_numpy, outputs))
            torch.testing.assert_close(have, module.run_flat([ids]), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="missing: input_ids"):
        execute_on_ranks(two, [{}], "torch")


def test_a_tampered_lane_stops_the_rank_that_reads_it(tmp_path: Path) -> None:
    directory = write_toy(tmp_path / "two.kraken", 2)
    path = directory / "lanes" / "lane-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"lane-1\.safetensors: changed since it was written"):
        execute_on_ranks(directory, [{"input_ids": np.zeros((1, 3), np.int64)}], "torch")


def test_load_outside_a_group(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    _, three = artifacts
    ids = torch.randint(0, 50, (2, 9))
    reference = LaneModule.from_program(toy_program(3), MemoryStore(toy_sources()).read)
    torch.testing.assert_close(load(three)(ids), reference(ids), rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"needs an initialised torch\.distributed process group"):
        RankProgram.load(open_artifact(three))
    other = write_toy(tmp_path / "other.kraken", 2)
    edit_manifest(other, backends={"onnx": {}})
    with pytest.raises(InputFileError, match=r"without the torch backend \(it has: onnx\)"):
        load(other)


def test_wrong_weights_are_found(tmp_path: Path) -> None:
    directory = write_toy(tmp_path / "two.kraken", 2)
    artifact = open_artifact(directory)
    path = artifact.path(SHARED_WEIGHTS)
    table = {name: spec for name, spec in artifact.manifest.weight_table.items() if spec.shared}
    with pytest.raises(InputFileError, match="lacks 1 weights, the first is 'absent'"):
        map_weights(path, table | {"absent": replace(table["w_scale"], name="absent")})
    with pytest.raises(InputFileError, match=r"weight 'w_scale' is torch\.float32 \[\]"):
        map_weights(path, table | {"w_scale": replace(table["w_scale"], dtype="float16")})


def test_failure_is_told(artifacts: tuple[Path, Path]) -> None:
    with pytest.raises(RankFailedError, match="rank 0 failed: ModuleNotFoundError"):
        run_ranks("tests.no_such_module:function", 1)
