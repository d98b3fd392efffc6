"""`--force` and the directories beside an artifact: only what a compile wrote is ever replaced or removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.artifact.reservation import check_target, reserved
from kraken_compiler.cli.compile import app as compile_app
from kraken_compiler.cli.heal import app as heal_app
from kraken_compiler.errors import InputFileError, KrakenError, UsageError
from kraken_compiler.training.rows import _hashes
from kraken_compiler.training.state import STATE_FILE, open_state, remove_run
from tests.cli_command import Command
from tests.toy_lane_program import write_toy

pytestmark = pytest.mark.slow

LOSSLESS = ("--degree", "2", "--form", "standard", "--no-verify")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.kraken", 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("source") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def work(tmp_path: Path, llama: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, an artifact, two texts, and years of work; the shell stands beside it."""
    work = tmp_path / "work"
    shutil.copytree(llama, work / "model")
    shutil.copytree(written, work / "old.kraken")
    (work / "thesis.tex").write_text("years of work")
    (work / "texts").mkdir()
    (work / "texts" / "one.txt").write_text("a text")
    (work / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return work


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: files by content, links by target."""
    paths = sorted(folder.rglob("*"))
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in paths
    }


def refused(work: Path, *arguments: str | Path) -> str:
    """What `kraken-compile MODEL ... --force` says; nothing may have changed."""
    before = tree(work.parent)
    line = Command(compile_app).refused(2, work / "model", *LOSSLESS, "--force", *arguments)
    assert tree(work.parent) == before
    return line


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("work", "is or holds .*/work/model, which is read"),
        ("work/model", "is or holds .*/work/model, which is read"),
        ("work/../work/model/", "is or holds .*/work/model, which is read"),
        ("work/texts", "not empty and holds one.txt, which no compile wrote"),
        (".", "is or holds .*/work/model, which is read"),
        ("/", "is or holds .*/work/model, which is read"),
        ("work/thesis.tex", "exists and is no directory"),
    ],
)
def test_what_is_not_ours_is_not_replaced(work: Path, output: str, reason: str) -> None:
    assert re.search(reason, refused(work, "-o", output))


def test_the_working_directory_stays(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for inside in (work / "old.kraken", work / "old.kraken" / "lanes", work / "empty"):
        monkeypatch.chdir(inside)
        target = work / ("empty" if inside.name == "empty" else "old.kraken")
        assert "is or holds the working directory" in refused(work, "-o", target)


def test_a_text_inside_the_artifact_stays(work: Path) -> None:
    artifact = work / "old.kraken"
    calibrated = ("--form", "kraken", "--calibrate", work / "model")
    line = refused(work, "-o", artifact, *calibrated, "--text", artifact / "report.json")
    assert "report.json, which is read" in line
    (work / "again").symlink_to(artifact / "lanes")
    line = refused(work, "-o", artifact, "--form", "kraken", "--calibrate", work / "again")
    assert "again, which is read" in line


@pytest.mark.parametrize("stray", ["notes.txt", "lanes/mine.safetensors", "tokenizer/vocabulary.txt", "runs/"])
def test_an_artifact_with_a_users_files_is_not_replaced(work: Path, stray: str) -> None:
    path = work / "old.kraken" / stray
    if stray.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert f"holds {stray.split('/')[0]}" in refused(work, "-o", work / "old.kraken")


def test_a_link_among_an_artifacts_files_is_a_users(work: Path) -> None:
    report = work / "old.kraken" / "report.json"
    report.unlink()
    report.symlink_to(work / "thesis.tex")
    assert "holds report.json" in refused(work, "-o", work / "old.kraken")


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"format_version": 2, "files": {"a": 1}, "kraken_compiler": "1"}', '{"name": "x"}']
)
def test_another_programs_manifest_makes_no_artifact(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=r"holds manifest\.json, which no compile wrote"):
        check_target(tmp_path / "app", force=True)


def test_a_link_stays_a_link(work: Path) -> None:
    links = {"to-artifact": "old.kraken", "to-empty": "empty", "to-nothing": "new.kraken", "twice": "to-artifact"}
    for name, target in links.items():
        (work / name).symlink_to(target)
    for name, target in links.items():
        write_toy(work / name, 2, force=True, report={"note": name})
        assert (work / name).readlink() == Path(target)
        assert open_artifact(work / name).report() == {"note": name}
    assert open_artifact(work / "old.kraken").report() == {"note": "twice"}
    (work / "to-model").symlink_to("model")
    assert "model, which is read" in refused(work, "-o", work / "to-model")
    (work / "to-texts").symlink_to(work / "texts", target_is_directory=True)
    assert "holds one.txt" in refused(work, "-o", work / "to-texts")


def test_a_link_loop_is_one_line(work: Path) -> None:
    (work / "a").symlink_to("b")
    (work / "b").symlink_to("a")
    assert "a link that leads back to itself" in refused(work, "-o", work / "a")


@pytest.mark.parametrize(("name", "error"), [("o" * 300, InputFileError), ("a\0b", UsageError)])
def test_a_name_that_no_directory_has(tmp_path: Path, name: str, error: type[KrakenError]) -> None:
    for path in (tmp_path / name, name):
        with pytest.raises(error, match=r"File name too long|is no path: embedded null"):
            check_target(path)
    check_target(tmp_path, inputs=[Path("a\0b")])


def test_graphs_in_the_artifacts_own_directory(work: Path) -> None:
    for dumps in ("new.kraken", "new.kraken/graphs", "new.kraken/../new.kraken"):
        line = refused(work, "-o", work / "new.kraken", "--dump-graphs", work / dumps)
        assert "is or lies in the artifact's directory" in line


def test_a_source_whose_path_is_no_text(work: Path) -> None:
    """Said before the work and not when the manifest is written."""
    (work / os.fsdecode(b"caf\xe9")).symlink_to("model")
    before = tree(work)
    line = Command(compile_app).refused(2, work / os.fsdecode(b"caf\xe9"), *LOSSLESS, "-o", work / "new.kraken")
    assert "the path of MODEL, which the artifact notes: not UTF-8 text (byte 0xe9 at character" in line
    assert tree(work) == before
    assert list(_hashes(work / os.fsdecode(b"caf\xe9") / "config.json", work / "model" / "config.json")) == [
        "config.json",
        "model/config.json",
    ]
    (work / os.fsdecode(b"t\xe9xt")).write_text("a text")
    assert list(_hashes(work / os.fsdecode(b"t\xe9xt"))) == ["t\\xe9xt"]


def test_a_bind_mount_of_the_source_is_the_source(work: Path) -> None:
    there = work / "bound"
    there.mkdir()
    made = subprocess.run(["mount", "--bind", str(work / "model"), str(there)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not permitted here: {made.stderr.decode().strip()}")
    try:
        with pytest.raises(UsageError, match=r"model/config\.json, which is read"):
            check_target(there, True, [work / "model" / "config.json"])
    finally:
        subprocess.run(["umount", str(there)], check=True)


def test_an_artifact_beside_its_source_is_replaced(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kraken-compile .` does that is run twice in a model's directory."""
    monkeypatch.chdir(work / "model")
    before = tree(work / "model")
    for force in ((), ("--force",)):
        result = Command(compile_app).invoke(".", *LOSSLESS, "-q", *force)
        assert result.exit_code == 0, result.output
    after = tree(work / "model")
    assert {name: content for name, content in after.items() if not name.startswith("model.kraken")} == before
    assert "is not empty" in Command(compile_app).refused(2, ".", *LOSSLESS)


def test_files_that_come_during_the_work_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def check(_: Path) -> dict[str, object]:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
        return {}

    with pytest.raises(UsageError, match=r"holds mine\.txt.*is in .*/out\.1\)"):
        write_toy(target, 2, force=True, check=check)
    assert (target / "mine.txt").read_text() == "mine"
    assert open_artifact(tmp_path / "out.1").manifest.degree == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.1"]


def _as_a_folder(place: Path) -> None:
    place.mkdir()
    (place / "draft.txt").write_text("mine")


def _as_a_link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    (place.parent / "elsewhere" / "draft.txt").write_text("mine")
    place.symlink_to("elsewhere")


def _beside_a_lock(place: Path) -> None:
    _as_a_folder(place)
    (place / "lock").touch()


@pytest.mark.parametrize("make", [_as_a_folder, _as_a_link, _beside_a_lock])
def test_a_users_folder_in_the_writers_place_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".out.partial")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"\.out\.partial is needed while the artifact is written"):
        write_toy(tmp_path / "out", 2, force=True)
    assert tree(tmp_path) == before


def test_a_killed_compiles_leftovers_are_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "artifact" / "lanes").mkdir(parents=True)
    (left / "artifact" / "lanes" / "lane-0.safetensors").write_text("half")
    (left / "lock").touch()
    (left / "key").write_text("of another model")
    write_toy(tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_among_the_leftovers_is_not_followed(tmp_path: Path) -> None:
    left, mine = tmp_path / ".out.partial", tmp_path / "mine"
    left.mkdir()
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (left / "lock").touch()
    (left / "artifact").symlink_to(mine)
    with reserved(tmp_path / "out") as held:
        held.prepare(keep_shards=True)
    assert (mine / "thesis.tex").exists()


@pytest.fixture
def heal_state(tmp_path: Path) -> Path:
    folder = tmp_path / "out.heal"
    open_state(folder, {"artifact": "a"}, restart=False)
    return folder


def test_a_runs_folder_keeps_what_the_run_did_not_write(heal_state: Path) -> None:
    for name in ("step-3.rank-0.safetensors", "lane-0.safetensors", "events.jsonl", "lock", "state.json.partial"):
        (heal_state / name).touch()
    for name in ("notes.txt", "step-by-step.md", "lane-0.safetensors.bak"):
        (heal_state / name).write_text("mine")
    with pytest.raises(UsageError, match=r"also holds lane-0\.safetensors\.bak, notes\.txt, step-by-step\.md"):
        open_state(heal_state, {"artifact": "b"}, restart=True)
    assert (heal_state / STATE_FILE).exists()
    remove_run(heal_state)
    assert sorted(path.name for path in heal_state.iterdir()) == [
        "lane-0.safetensors.bak",
        "notes.txt",
        "step-by-step.md",
    ]


def test_heal_replaces_neither_source_nor_texts_nor_what_it_heals(work: Path) -> None:
    artifact = work / "old.kraken"
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["source"]["path"] = str(work / "model")
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(artifact, work / "other.kraken")
    (work / "other.kraken" / "notes.txt").write_text("mine")
    before = tree(work.parent)
    text = ("--text", work / "texts" / "one.txt", "--steps", "2", "--force")
    for output, reason in {
        "old.kraken": "is the artifact that is healed",
        "old.kraken/torch": "lies inside it",
        "model": "model, which is read",
        "texts": "one.txt, which is read",
        ".": "which is read",
        "other.kraken": "holds notes.txt",
    }.items():
        line = Command(heal_app).refused(2, artifact, *text, "-o", work / output)
        assert reason in line, line
    assert tree(work.parent) == before
