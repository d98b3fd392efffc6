"""`kraken-heal`: the result is a better artifact; a killed run goes on where it was; what is wrong is one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.load import load
from kraken_compiler.cli.heal import app
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.verify.verification import Verification
from tests.cli_command import Command
from tests.once import CaptureOnce
from tests.test_cli_compile import save_model
from tests.test_cli_verify import set_source
from tests.zoo import random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

EXACT = ("--precision", "float32")
"""Not the default where there is a GPU."""
QUICK = ("--sequence", "12", "--batch", "4", "--learning-rate", "3e-3", "--evaluate-tokens", "256", *EXACT)


@pytest.fixture(scope="module", autouse=True)
def capture_once() -> Iterator[None]:
    """The source model is captured once."""
    once = CaptureOnce()
    with once.in_place(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("kraken_compiler.commands.source.capture", once)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, `llama`, its Kraken form for two ranks and two devices, `llama.kraken`, a text and token ids."""
    place = tmp_path_factory.mktemp("heal")
    save_model("llama", place / "llama")
    compile_model(place / "llama", place / "llama.kraken", degree=2, backends=("torch", "onnx"), verify=False)
    ids = random_tokens(94, 400, 12) + 3
    (place / "words.txt").write_text("\n".join(" ".join(f"w{number}" for number in row) for row in ids.tolist()))
    (place / "more").mkdir()
    shutil.copy(place / "words.txt", place / "more" / "words.txt")
    np.save(place / "ids.npy", ids.numpy().astype(np.int32))
    return place


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the new artifact starts ranks; most tests are about what comes before."""
    monkeypatch.setattr("kraken_compiler.commands.heal.verify_programs", lambda *arguments: Verification())


command = Command(app)
invoke, healed, refused = command.invoke, command.answer, command.refused


def lanes_of(artifact: Path) -> list[dict[str, torch.Tensor]]:
    shared = load_file(artifact / "lanes" / "shared.safetensors")
    return [load_file(artifact / "lanes" / f"lane-{lane}.safetensors") | shared for lane in range(2)]


def test_an_artifact_becomes_a_better_artifact(place: Path, tmp_path: Path) -> None:
    output, board = tmp_path / "out.kraken", tmp_path / "board"
    texts = (place / "words.txt", place / "more" / "words.txt")
    arguments = ("--steps", "12", "--evaluate-every", "6", *QUICK, "-o", output, "--tensorboard", board)
    (place / "few.txt").write_text("w3 w4 w5")
    answer = healed(place / "llama.kraken", "--text", *texts, place / "few.txt", *arguments)
    assert answer["notes"] == ["1 of 3 texts have no row of 12 tokens and are left out: few.txt"]
    record = answer["healed"]
    assert record["kl_after"] < 0.95 * record["kl_before"]
    assert [entry["step"] for entry in answer["held_out"]] == [0, 6, 12]
    assert answer["held_out"][2]["kl"] == record["kl_after"] == answer["after"]["kl"]
    assert (record["steps"], record["tokens"]) == (12, 12 * 4 * 12)
    assert list(record["texts"]) == ["words.txt", "more/words.txt"]
    kinds = {entry["what"].split("(")[0].strip() for entry in answer["verification"]["program"]["comparisons"]}
    assert any("ranks" in kind for kind in kinds)
    assert any("devices" in kind for kind in kinds)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board", "out.kraken"]
    assert any(board.iterdir())

    artifact = open_artifact(output)
    old = open_artifact(place / "llama.kraken").manifest
    manifest = artifact.manifest
    assert manifest.healed[0].model_dump(mode="json") == record
    assert (manifest.backends, manifest.forms, manifest.has_tokenizer) == (old.backends, old.forms, True)
    assert artifact.report()["healing"]
    assert not any(
        torch.equal(new, lane[name])
        for lane, lane_new in zip(lanes_of(place / "llama.kraken"), lanes_of(output), strict=True)
        for name, new in lane_new.items()
        if name.endswith("proj_weight")
    )
    assert load(output)(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 97)
    verified = verify_artifact(output, text=place / "words.txt", text_tokens=256)
    assert verified.quality is not None


def test_a_healed_standard_form_is_no_broken_one(place: Path, tmp_path: Path) -> None:
    compile_model(place / "llama", tmp_path / "standard.kraken", degree=2, form="standard", verify=False)
    # Documents of 12 tokens are rows of 12, whatever length of row the model takes.
    answer = healed(tmp_path / "standard.kraken", "--tokens", place / "ids.npy", "--steps", "1", *QUICK[2:])
    assert answer["healed"]["tokens"] == 4 * 12
    assert answer["artifact"] == str(tmp_path / "standard.healed.kraken")
    assert answer["before"]["kl"] < 1e-6
    assert verify_artifact(tmp_path / "standard.healed.kraken").comparisons


@pytest.mark.usefixtures("no_ranks")
def test_ranks_and_token_files(place: Path, tmp_path: Path) -> None:
    rows = torch.tensor(np.load(place / "ids.npy"))
    save_file({"ids": rows.flatten()}, tmp_path / "ids.safetensors")
    common = (place / "llama.kraken", "--steps", "4", "--tokens", tmp_path / "ids.safetensors", *QUICK)
    alone = healed(*common, "-o", tmp_path / "alone.kraken")
    ranks = healed(*common, "-o", tmp_path / "ranks.kraken", "--ranks", "--save-every", "2")
    assert ranks["after"]["kl"] == pytest.approx(alone["after"]["kl"], rel=1e-3)
    assert [entry["step"] for entry in ranks["held_out"]] == [0, 4]
    for one, other in zip(lanes_of(tmp_path / "alone.kraken"), lanes_of(tmp_path / "ranks.kraken"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("no_ranks")
def test_a_killed_run_ends_bit_equal_to_an_uninterrupted_one(place: Path, tmp_path: Path) -> None:
    common = (place / "llama.kraken", "--tokens", place / "ids.npy", "--steps", "60", "--evaluate-every", "30", *QUICK)
    straight = healed(*common, "-o", tmp_path / "straight.kraken")
    output = tmp_path / "killed.kraken"
    state = tmp_path / "killed.kraken.heal" / "state.json"
    arguments = [*map(str, common), "-o", str(output), "--save-every", "1", "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "kraken_compiler.cli.heal", *arguments])
    deadline = time.monotonic() + 200
    while step_in(state) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert 3 <= step_in(state) < 60

    changed = refused(2, *common, "-o", output, "--batch", "3")
    assert "killed.kraken.heal holds an unfinished run with other settings: --batch was 4 and is 3" in changed
    assert "--restart" in changed
    answer = healed(*common, "-o", output)
    assert 3 <= answer["resumed_from"] < 60
    assert not state.parent.exists()
    assert answer["held_out"] == straight["held_out"]
    torch.testing.assert_close(lanes_of(output), lanes_of(tmp_path / "straight.kraken"), rtol=0, atol=0)


def step_in(state: Path) -> int:
    return int(json.loads(state.read_text())["step"]) if state.exists() else 0


@pytest.mark.usefixtures("no_ranks")
def test_a_config_file(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "heal.toml"
    config.write_text(f'tokens = ["{place / "ids.npy"}"]\nsteps = 2\nsequence = 12\nlora = 2\nlearning-rate = 0.01\n')
    answer = healed(place / "llama.kraken", "--config", config, "--steps", "1", "-o", tmp_path / "out.kraken")
    settings = answer["healed"]["settings"]
    assert (settings["steps"], settings["lora"], settings["learning_rate"]) == (1, 2, 0.01)
    config.write_text("learning_rate = 0.01\n")
    said = refused(2, place / "llama.kraken", "--config", config)
    assert "there is no key 'learning_rate'; did you mean 'learning-rate'?" in said


def test_what_is_wrong_is_one_line(place: Path, tmp_path: Path) -> None:
    artifact, text, ids = place / "llama.kraken", ("--text", place / "words.txt"), ("--tokens", place / "ids.npy")
    output = ("-o", tmp_path / "out.kraken")
    few = ("--steps", "1", *output)
    assert "--steps is needed" in refused(2, artifact, *text, *output)
    assert "name a text" in refused(2, artifact, *few)
    assert "cannot read" in refused(5, artifact, "--text", tmp_path / "none.txt", *few)
    assert "cannot read" in refused(5, artifact, "--tokens", tmp_path / "none.npy", *few)
    assert "--batch 0: must be at least 1" in refused(2, artifact, *text, *few, "--batch", "0")
    assert "--precision int8" in refused(2, artifact, *text, *few, "--precision", "int8")
    assert "the artifact that is healed" in refused(2, artifact, *text, "--steps", "1", "-o", artifact)
    assert "no artifact here" in refused(5, tmp_path / "none.kraken", *text, *few)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").touch()
    assert "is not empty" in refused(2, artifact, *text, "--steps", "1", "-o", occupied)

    (tmp_path / "short.txt").write_text("w3 w4 w5")
    short = refused(2, artifact, "--text", tmp_path / "short.txt", *few)
    assert "too short: 4 tokens give 0 rows of 64 to train on and 0 held out" in short
    np.save(tmp_path / "large.npy", np.array([5, 97]))
    assert "holds ids from 5 to 97; the model knows 0 to 96" in refused(
        5, artifact, "--tokens", tmp_path / "large.npy", *few
    )
    np.save(tmp_path / "real.npy", np.array([0.5]))
    assert "not whole numbers" in refused(5, artifact, "--tokens", tmp_path / "real.npy", *few)
    content = (place / "ids.npy").read_bytes()
    for damaged in (b"", content[:40], b"PK" + content, content[:20] + b"(((" + content[23:]):
        (tmp_path / "damaged.npy").write_bytes(damaged)
        assert "is no .npy file of numbers" in refused(5, artifact, "--tokens", tmp_path / "damaged.npy", *few)
    save_file({"ids": torch.ones(8, dtype=torch.bfloat16)}, tmp_path / "real.safetensors")
    assert "bfloat16 [8], not whole numbers" in refused(5, artifact, "--tokens", tmp_path / "real.safetensors", *few)
    inside = ("--tensorboard", tmp_path / "out.kraken" / "curves")
    assert "which the run writes" in refused(2, artifact, *text, *few, *inside)
    assert "is no directory" in refused(2, artifact, *text, *few, "--tensorboard", tmp_path / "short.txt")
    (tmp_path / "ids.txt").write_text("1 2 3")
    assert ".npy or .safetensors" in refused(5, artifact, "--tokens", tmp_path / "ids.txt", *few)
    assert "nowhere does not exist" in refused(5, artifact, *ids, *few, "--source", place / "nowhere")
    assert not (tmp_path / "out.kraken").exists()
    assert not (tmp_path / "out.kraken.heal").exists()


def test_artifacts_that_cannot_be_healed(place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place / "llama.kraken", tmp_path / "copy.kraken"))
    few = ("--steps", "1", "--tokens", place / "ids.npy")
    set_source(copy, path=str(tmp_path / "gone"))
    assert "its source is not at" in refused(2, copy, *few)
    set_source(copy, path=str(place / "llama"), sha256="0" * 64)
    assert "is not the model that" in refused(5, copy, *few)
    set_source(copy, path="", kind="module")
    assert "a module in memory" in refused(2, copy, *few)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "backends": {"onnx": {}}}))
    line = refused(2, copy, *few)
    assert "holds no lane program but for a runtime of its own; compile the model with --backend torch,onnx" in line
    bare = save_model("llama", tmp_path / "bare", tokenizer=False)
    compile_model(bare, tmp_path / "bare.kraken", degree=2, verify=False)
    said = refused(2, tmp_path / "bare.kraken", "--text", place / "words.txt", "--steps", "1")
    assert "has no tokenizer" in said
    assert "--tokens" in said
    assert not os.path.exists(tmp_path / "bare.healed.kraken.heal")
