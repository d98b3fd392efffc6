"""`kraken-train`: what is trained is the model itself, on ranks as in one process, and a killed run goes on."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kraken_compiler.cli.train import app
from kraken_compiler.commands.train import RECORD_FILE, TrainResult, train_model
from kraken_compiler.errors import UsageError
from kraken_compiler.native import KrakenConfig, KrakenLM
from kraken_compiler.native.directory import load_native
from kraken_compiler.passes.form.join_streams import lane_source
from kraken_compiler.texts.read import sample_text
from kraken_compiler.training.from_scratch.build import trained_program, trainer_of
from kraken_compiler.training.from_scratch.config_file import model_in
from kraken_compiler.training.from_scratch.ranks import new_model
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.from_scratch.tokenizer import train_tokenizer
from kraken_compiler.training.objective import NextToken

GPT = KrakenConfig(layers=2, width=32, heads=4, degree=2, vocabulary=64, context=32)
LLAMA = replace(GPT, kv_heads=2, norm="rms", ffn="swiglu", positions="rotary", degree=3)
SETTINGS = TrainSettings(
    steps=6, batch=6, sequence=16, learning_rate=3e-3, hold_out=0.2, evaluate_every=3, save_every=3
)
CONFIG = """
steps = 6
batch = 6
sequence = 16
save-every = 2
hold-out = 0.2
[model]
preset = "kraken-125m-2"
layers = 2
width = 32
heads = 4
vocabulary = 400
context = 32
"""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Tokens in which each follows from the one before."""
    path = tmp_path / "tokens.npy"
    np.save(path, (np.arange(4000) * 7 + np.arange(4000) // 50) % GPT.vocabulary)
    return path


@pytest.mark.parametrize("config", [GPT, LLAMA, replace(GPT, degree=1)], ids=["gpt", "llama", "one lane"])
def test_loss_and_gradients_are_the_models(config: KrakenConfig) -> None:
    model = new_model(config, seed=3)
    ids = torch.randint(config.vocabulary, (3, 17))
    trainer = trainer_of(model, NextToken(), SETTINGS, torch.device("cpu"))
    loss = trainer.loss(ids)
    loss.backward()
    expected = model.loss(ids)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    program, _ = trained_program(model)
    wanted = dict(model.named_parameters())
    seen = set()
    for name, parameter in trainer.parameters.trained().items():
        spec = program.weights[name.partition(".")[0]]
        assert parameter.grad is not None
        for lane in range(config.degree):
            source = lane_source(spec.source, lane)
            gradient = parameter.grad if spec.shared else parameter.grad[lane]
            torch.testing.assert_close(gradient, wanted[source].grad, rtol=1e-4, atol=1e-6)
            seen.add(source)
    assert seen == set(wanted), "every parameter is trained, and the embedding is one with the head"


def test_what_is_written_is_what_was_trained(tokens: Path, tmp_path: Path) -> None:
    result = train_model(GPT, SETTINGS, tokens=[tokens], output=tmp_path / "model")
    assert result.outcome.after["loss"] < result.outcome.before["loss"] < 1.1 * math.log(GPT.vocabulary)
    model = load_native(tmp_path / "model")
    assert model.config == GPT
    assert not torch.equal(model.embedding.weight, new_model(GPT, SETTINGS.seed).embedding.weight)
    record = json.loads((tmp_path / "model" / RECORD_FILE).read_text())
    assert record["after"]["loss"] == result.outcome.after["loss"]
    assert not (tmp_path / "model.train").exists()
    again = train_model(GPT, SETTINGS, tokens=[tokens], output=tmp_path / "again")
    assert all(map(torch.equal, _weights(result), _weights(again))), "the same run gives the same weights"
    other = train_model(GPT, replace(SETTINGS, seed=1), tokens=[tokens], output=tmp_path / "other")
    assert not torch.equal(next(_weights(other)), next(_weights(result)))


def _weights(result: TrainResult) -> Any:
    return iter(load_native(result.directory).state_dict().values())


def test_a_tokenizer_is_learnt_from_the_texts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "texts" / "inner").mkdir(parents=True)
    for number, name in enumerate(("a.txt", "inner/b.txt")):
        (tmp_path / "texts" / name).write_text(sample_text()[number * 3000 :])
    config = replace(GPT, vocabulary=400)
    train_model(config, SETTINGS, texts=[tmp_path / "texts"], output=tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert 257 < len(tokenizer) <= 400
    assert tokenizer.decode(tokenizer("Größe, 42 km\n")["input_ids"]) == "Größe, 42 km\n"
    assert json.loads((tmp_path / "model" / RECORD_FILE).read_text())["after"]["tokens"] > 100
    given = train_model(
        config, SETTINGS, texts=[tmp_path / "texts"], tokenizer=tmp_path / "model", output=tmp_path / "given"
    )
    assert len(list(_weights(given))) == len(list(KrakenLM(config).state_dict()))


def test_the_tokenizer_needs_room_for_all_bytes() -> None:
    with pytest.raises(UsageError, match="a vocabulary of 200 is too small"):
        train_tokenizer(["a text"], 200)


def test_a_preset_is_where_the_config_begins(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[model]\npreset = "kraken-350m-4"\nvocabulary = 1000\n')
    config = model_in(path)
    assert (config.layers, config.width, config.degree, config.vocabulary) == (24, 644, 4, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 2\n", r"there is no table \[model\]"),
        ("[model]\nlayer = 2\n", "there is no key 'layer'; did you mean 'layers'"),
        ('[model]\nlayers = "two"\n', "layers must be a whole number, not 'two'"),
        ('[model]\npreset = "kraken-1b-2"\n', "there is no preset 'kraken-1b-2'; choose from kraken-125m-2"),
        ("[model]\nwidth = 30\nheads = 4\n", "a width of 30 is no multiple of 4 heads"),
        ("[model]\nlayers = 2\n[train]\nsteps = 3\n", "there is no key 'train'"),
        ("[model]\nlayers = 2\n", "--steps is needed"),
        ("[model\n", "is no TOML"),
    ],
)
def test_a_wrong_config_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    result = CliRunner().invoke(app, [str(path), "--text", str(path), "-o", str(tmp_path / "model")])
    assert result.exit_code in (2, 5)
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_trained_is_refused(tokens: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"

    def refused(match: str, settings: TrainSettings = SETTINGS, config: KrakenConfig = GPT, **keywords: Any) -> None:
        with pytest.raises(UsageError, match=match):
            train_model(config, settings, **{"tokens": [tokens], "output": output, **keywords})
        assert not output.exists()
        assert not (tmp_path / "model.train").exists()

    refused("say where the model goes", output=None)
    refused("name something to train on", tokens=[])
    refused("there is no directory", output=tmp_path / "nowhere" / "model")
    refused("--batch 6: 7 processes need a row each", replace(SETTINGS, ranks=7))
    refused("--ranks 0: must be at least 1", replace(SETTINGS, ranks=0))
    refused("the texts are too short", replace(SETTINGS, hold_out=0.999))
    output.mkdir()
    (output / "mine").write_text("keep")
    with pytest.raises(UsageError, match="is there and not empty"):
        train_model(GPT, SETTINGS, tokens=[tokens], output=output)
    assert (output / "mine").read_text() == "keep"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "config"), [(2, GPT), (3, GPT), (3, LLAMA), (2, LLAMA)])
def test_ranks_train_what_one_process_does(ranks: int, config: KrakenConfig, tokens: Path, tmp_path: Path) -> None:
    """As many ranks as lanes have a lane each; of any other number all have all lanes."""
    settings = replace(SETTINGS, batch=7)
    alone = train_model(config, settings, tokens=[tokens], output=tmp_path / "alone")
    on_ranks = train_model(config, replace(settings, ranks=ranks), tokens=[tokens], output=tmp_path / "ranks")
    for (_, have), (_, want) in zip(on_ranks.outcome.held_out, alone.outcome.held_out, strict=True):
        assert have == pytest.approx(want, rel=1e-4)
    for have, want in zip(_weights(on_ranks), _weights(alone), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(), ("--ranks", "2"), ("--ranks", "3")], ids=["alone", "lanes", "replicas"])
def test_a_killed_run_ends_bit_equal(ranks: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.replace("steps = 6", "steps = 60"))
    (tmp_path / "text.txt").write_text(sample_text())

    def command(output: str) -> list[str]:
        arguments = [str(tmp_path / "config.toml"), "--text", str(tmp_path / "text.txt"), *ranks]
        return [sys.executable, "-m", "kraken_compiler.cli.train", *arguments, "-o", str(tmp_path / output)]

    killed = subprocess.Popen(command("killed"), start_new_session=True, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed.train" / "state.json"
    end = time.monotonic() + 120
    while not state.exists() or json.loads(state.read_text())["step"] < 4:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    resumed = subprocess.run(command("killed"), capture_output=True, text=True, check=True)
    assert "resumed after step" in resumed.stdout
    subprocess.run(command("whole"), check=True, capture_output=True)
    for have, want in zip(*(load_native(tmp_path / name).state_dict().values() for name in ("killed", "whole"))):
        assert torch.equal(have, want)
    assert not (tmp_path / "killed.train").exists()
