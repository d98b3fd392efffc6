"""The artifact: whole or not at all, and believed only when it is exactly what was written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.artifact.reservation import check_target
from kraken_compiler.errors import InputFileError, UsageError, VerificationError
from tests.toy_lane_program import edit_manifest, toy_program, write_toy


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("artifact") / "toy.kraken", 2)


@pytest.fixture
def artifact(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "toy.kraken"))


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; needs root."""
    place = tmp_path / "mount"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting is not permitted here: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def beside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_manifest_says_what_the_program_is(written: Path) -> None:
    manifest = open_artifact(written).manifest
    program = toy_program(2)
    assert manifest.weight_table == program.weights
    assert list(manifest.weight_table) == list(program.weights)
    assert manifest.inputs == program.inputs
    assert manifest.call == program.call
    assert manifest.plan == program.plan
    assert (manifest.degree, manifest.dtype, manifest.forms) == (2, "float32", ("parallel", "parallel"))
    assert [window.promised for window in manifest.windows] == [(2,), (), (4,), ()]
    assert sorted(manifest.files) == [
        "lanes/lane-0.safetensors",
        "lanes/lane-1.safetensors",
        "lanes/lane.json",
        "lanes/shared.safetensors",
        "report.json",
    ]
    assert open_artifact(written).report() == {"note": "toy"}


def test_no_pickle_and_no_path_of_the_maker(written: Path) -> None:
    content = (written / "lanes" / "lane.json").read_text()
    assert json.loads(content)["inputs"][-1] == "input_ids"
    assert "/work/" not in content
    assert ".py" not in content


def test_a_directory_in_use_is_refused(artifact: Path) -> None:
    with pytest.raises(UsageError, match=r"is not empty.*--force"):
        write_toy(artifact, 2)
    with pytest.raises(UsageError, match="is no directory"):
        check_target(artifact / "manifest.json")


def test_force_replaces_the_whole(artifact: Path) -> None:
    lost = artifact / "lanes" / "lane-9.safetensors"
    lost.write_bytes(b"of an earlier version")
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    edit_manifest(artifact, format_version=1, files=files | {"lanes/lane-9.safetensors": {"sha256": "", "bytes": 21}})
    write_toy(artifact, 2, force=True, report={"note": "second"})
    assert beside(artifact) == ["lanes", "manifest.json", "report.json"]
    assert open_artifact(artifact).report() == {"note": "second"}
    assert beside(artifact.parent) == [artifact.name]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "made" / "toy.kraken"
    target.mkdir(parents=True)
    write_toy(target, 2)
    open_artifact(target)


def fail(directory: Path) -> None:
    (directory / "half").write_text("written")
    raise RuntimeError("the tokenizer cannot be saved")


def test_a_failed_write_leaves_the_old_artifact_and_nothing_else(artifact: Path, tmp_path: Path) -> None:
    for target in (artifact, tmp_path / "new.kraken"):
        with pytest.raises(RuntimeError, match="cannot be saved"):
            write_toy(target, 2, force=True, tokenizer_saver=fail)
    open_artifact(artifact)
    assert beside(tmp_path) == [artifact.name]


def test_what_fails_its_check_is_never_seen(artifact: Path) -> None:
    def refuse(directory: Path) -> dict[str, object]:
        assert open_artifact(directory).manifest.degree == 2
        raise VerificationError("computes something else")

    with pytest.raises(VerificationError, match="computes something else"):
        write_toy(artifact, 2, force=True, check=refuse, report={"note": "second"})
    assert open_artifact(artifact).report() == {"note": "toy"}
    assert beside(artifact.parent) == [artifact.name]
    write_toy(artifact, 2, force=True, check=lambda _: {"passed": True})
    assert open_artifact(artifact).report() == {"note": "toy", "verification": {"passed": True}}


def test_tokenizer_files_are_part_of_it(tmp_path: Path) -> None:
    write_toy(tmp_path / "a", 2, tokenizer_saver=lambda place: (place / "vocabulary.txt").write_text("a b"))
    artifact = open_artifact(tmp_path / "a")
    assert artifact.tokenizer == tmp_path / "a" / "tokenizer"
    assert artifact.tokenizer_files == ("tokenizer/vocabulary.txt",)
    (tmp_path / "a" / "tokenizer" / "vocabulary.txt").write_text("a c")
    with pytest.raises(InputFileError, match=r"vocabulary\.txt: changed"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("name", ["lanes/lane.json", "lanes/lane-1.safetensors", "report.json"])
def test_a_changed_byte_is_found(artifact: Path, name: str) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    with pytest.raises(InputFileError, match=f"{name}: changed since it was written"):
        open_artifact(artifact)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_files_are_found_without_hashing(artifact: Path, verify: bool) -> None:
    path = artifact / "lanes" / "lane-0.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputFileError, match=r"lane-0\.safetensors: truncated"):
        open_artifact(artifact, verify)
    path.unlink()
    with pytest.raises(InputFileError, match=r"lane-0\.safetensors: missing"):
        open_artifact(artifact, verify)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99, this version reads 3"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"source": {"kind": "module", "name": "a", "surprise": 1}}, "unknown key 'source.surprise'"),
        ({"degree": 0}, "'degree'"),
        ({"degree": "two"}, "'degree'"),
        ({"weights": None}, "'weights'"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "not a path inside the artifact"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "not a path inside the artifact"),
        ({"files": {"torch/../../x": {"sha256": "0" * 64, "bytes": 1}}}, "not a path inside the artifact"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(artifact: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(artifact, **changes)
    with pytest.raises(InputFileError, match=message) as error:
        open_artifact(artifact)
    assert "\n" not in str(error.value)
    assert "manifest.json" in str(error.value)


def test_unknown_keys_deep_inside_are_refused(artifact: Path) -> None:
    weights = json.loads((artifact / "manifest.json").read_text())["weights"]
    weights[1]["surprise"] = 1
    edit_manifest(artifact, weights=weights)
    with pytest.raises(InputFileError, match=r"unknown key 'weights\.1.*surprise'"):
        open_artifact(artifact)


def test_no_artifact(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no artifact here"):
        open_artifact(tmp_path / "nowhere")
    (artifact / "manifest.json").write_text("{")
    with pytest.raises(InputFileError, match="not JSON"):
        open_artifact(artifact)


def test_a_target_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((InputFileError, UsageError), match="file/toy") as error:
        write_toy(tmp_path / "file" / "toy", 2)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_read_only_target(tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(InputFileError, match="cannot be written: Read-only file system") as error:
        write_toy(tmpfs / "toy.kraken", 2)
    assert "\n" not in str(error.value)
    assert beside(tmpfs) == []


@pytest.mark.slow
def test_a_full_target(tmpfs: Path) -> None:
    (tmpfs / "ballast").write_bytes(bytes(1000 * 1024))
    with pytest.raises(InputFileError, match="No space left on device") as error:
        write_toy(tmpfs / "toy.kraken", 2)
    assert "\n" not in str(error.value)
    assert beside(tmpfs) == ["ballast"]


def test_manifest_survives_json(written: Path) -> None:
    text = (written / "manifest.json").read_text()
    assert json.loads(Manifest.model_validate_json(text, strict=True).model_dump_json()) == json.loads(text)
