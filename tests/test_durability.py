"""A compile may be killed, meet a full disk or a rival: the artifact is the old one, the new one, or not there."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.artifact.reservation import reserved
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.weights.io import safetensors_writer
from tests.toy_lane_program import write_toy

SEED = 20240


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `tests/killed_writes.py` found."""
    command = [sys.executable, "-m", "tests.killed_writes", str(tmp_path_factory.mktemp("killed")), str(SEED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_a_killed_compile_leaves_no_artifact_or_a_whole_one(killed: dict[str, dict[str, Any]]) -> None:
    assert killed["nothing before"].keys() == {"none", "new"}
    assert killed["replaced"].keys() == {"old", "new"}
    assert killed["replaced in two steps"].keys() == {"old", "none", "new"}
    assert sum(sum(killed[name].values()) for name in ("nothing before", "replaced", "replaced in two steps")) > 60


@pytest.mark.slow
def test_a_compile_killed_at_any_time_leaves_the_old_artifact_or_the_new(killed: dict[str, dict[str, Any]]) -> None:
    found = killed["at any time"]
    assert found.pop("left over") == 0
    assert set(found) <= {"old", "new"}


@pytest.mark.slow
def test_a_rerun_resumes_finished_shards(killed: dict[str, dict[str, Any]]) -> None:
    found = killed["resumed"]
    assert found["same"]
    assert found["read_again"] == 3  # the two that were not read, and the one that was being written


@pytest.mark.slow
def test_a_rerun_believes_only_what_has_the_right_hash(killed: dict[str, dict[str, Any]]) -> None:
    found = killed["resumed with damage"]
    assert found["same"]
    assert 3 < found["read_again"] < found["sources"]
    assert killed["resumed with another source"]["read_again"] == found["sources"]


def test_only_shards_are_taken_over(tmp_path: Path) -> None:
    with reserved(tmp_path / "toy.kraken") as held:
        assert held.left_key == ""
        (held.prepare(keep_shards=False) / "lane-0.safetensors").write_text("its shard")
        (held.partial / "lane.json").write_text("its graph")
        held.note_key("one model")
        assert held.left_key == "one model"
        assert [path.name for path in held.prepare(keep_shards=True).iterdir()] == ["lane-0.safetensors"]
        assert list(held.prepare(keep_shards=False).iterdir()) == []
        assert held.left_key == ""
    assert list(tmp_path.iterdir()) == []


def test_what_fails_leaves_no_directories(tmp_path: Path) -> None:
    def fail(_: Path) -> dict[str, object]:
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        write_toy(tmp_path / "a" / "b" / "toy.kraken", 2, check=fail)
    assert list(tmp_path.iterdir()) == []


def test_of_two_compiles_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    target = tmp_path / "toy.kraken"

    def rival(partial: Path) -> dict[str, object]:
        with pytest.raises(UsageError, match=r"toy\.kraken: another compile is writing it") as error:
            write_toy(target, 2, force=True, report={"note": "rival"})
        assert "\n" not in str(error.value)
        assert (partial / "manifest.json").exists()
        return {}

    write_toy(target, 2, check=rival, report={"note": "first"})
    assert open_artifact(target).report()["note"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def one_line(error: pytest.ExceptionInfo[InputFileError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("bytes_allowed", [4000, 20_000])
def test_a_file_that_grows_too_large_is_named(tmp_path: Path, bytes_allowed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, hard))
    try:
        with pytest.raises(InputFileError, match="cannot be written: File too large") as error:
            write_toy(tmp_path / "toy.kraken", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "toy.kraken" / "lanes") in one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "open", "close"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_shard_that_cannot_be_written_is_named(tmp_path: Path, call: str, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    failing = SimpleNamespace(**vars(os) | {call: fail})
    write_toy(tmp_path / "toy.kraken", 2)
    with (
        mock.patch.object(safetensors_writer, "os", failing),
        pytest.raises(InputFileError, match=f"cannot be written: {os.strerror(number)}") as error,
    ):
        write_toy(tmp_path / "toy.kraken", 2, force=True, report={"note": "second"})
    assert one_line(error).startswith(str(tmp_path / "toy.kraken" / "lanes" / "lane-"))
    assert open_artifact(tmp_path / "toy.kraken").report() == {"note": "toy"}
    assert [path.name for path in tmp_path.iterdir()] == ["toy.kraken"]


def test_a_file_of_ours_that_cannot_be_synced_is_named(tmp_path: Path) -> None:
    with (
        mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error")),
        pytest.raises(
            InputFileError, match=r"toy\.kraken/report\.json: cannot be written: Input/output error"
        ) as error,
    ):
        write_toy(tmp_path / "toy.kraken", 2)
    one_line(error)
