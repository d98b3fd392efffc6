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

from kraken_compiler.capture import capture
from kraken_compiler.cli.train import app
from kraken_compiler.commands.train import RECORD_FILE, TrainResult, train_model
from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.native import KrakenConfig, KrakenLM
from kraken_compiler.native.directory import load_native
from kraken_compiler.passes.form.join_streams import lane_source
from kraken_compiler.texts.read import sample_text
from kraken_compiler.training.from_scratch import upcycle
from kraken_compiler.training.from_scratch.build import new_model, trained_program, trainer_of
from kraken_compiler.training.from_scratch.config_file import model_in
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.from_scratch.tokenizer import train_tokenizer
from kraken_compiler.training.from_scratch.upcycle import upcycled
from kraken_compiler.training.objective import NextToken
from kraken_compiler.training.watch import SilentWatch, StepRecord

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


def test_embeddings_have_a_rate_of_their_own() -> None:
    settings = replace(SETTINGS, weight_decay=0.0, embedding_rate=5.0)
    trainer = trainer_of(new_model(GPT, seed=3), NextToken(), settings, torch.device("cpu"))
    table = trainer.parameters.table
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.trained().items()}
    trainer.step(torch.arange(3 * 17).view(3, 17) % GPT.vocabulary, 1e-3)
    moved = {
        table[trainer.parameters.weight_name(name)].source: (parameter - before[name]).abs().max().item()
        for name, parameter in trainer.parameters.trained().items()
    }
    # AdamW's first step moves what has a gradient by its rate; a bias of keys has none.
    embeddings = {"embedding.weight", "positions.weight"}
    assert embeddings < moved.keys()
    for source, most in moved.items():
        if source.endswith("key.bias"):
            continue
        assert most == pytest.approx(5e-3 if source in embeddings else 1e-3, rel=0.05), source


def test_what_is_written_is_what_was_trained(tokens: Path, tmp_path: Path) -> None:
    other_work = tmp_path / ".model.partial" / "of a compile"
    other_work.mkdir(parents=True)
    result = train_model(GPT, SETTINGS, tokens=[tokens], output=tmp_path / "model")
    assert other_work.exists()
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


class Recorder(SilentWatch):
    """Keeps what every step was."""

    def __init__(self, records: list[StepRecord]) -> None:
        self._records = records

    def stepped(self, record: StepRecord) -> None:
        self._records.append(record)


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
        ('[model]\npreset = ["kraken-125m-2"]\n', "there is no preset"),
        ("[model]\nexpansion = nan\n", "expansion of a Kraken model must be a number above 0"),
        ("[model]\nnorm_epsilon = 0.0\n", "norm_epsilon of a Kraken model must be a number above 0"),
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
    refused("rows of one token have no next one", config=replace(GPT, context=1))
    refused("lies inside --text", texts=[tmp_path], tokens=[])
    refused("--ranks 0: must be at least 1", replace(SETTINGS, ranks=0))
    refused("the texts are too short", replace(SETTINGS, hold_out=0.999))
    refused("--output /: name a directory in it", output=Path("/"))
    for curves in (output / "logs", tmp_path / "model.train"):
        refused("--tensorboard .*: lies in .*, which the run writes", tensorboard=curves)
    output.mkdir()
    (output / "mine").write_text("keep")
    with pytest.raises(UsageError, match="is there and not empty"):
        train_model(GPT, SETTINGS, tokens=[tokens], output=output)
    assert (output / "mine").read_text() == "keep"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "config"), [(2, GPT), (3, GPT), (3, LLAMA), (2, LLAMA), (1, replace(GPT, degree=1))])
def test_ranks_train_what_one_process_does(ranks: int, config: KrakenConfig, tokens: Path, tmp_path: Path) -> None:
    """As many ranks as lanes have a lane each; of any other number all have all lanes."""
    # Unclipped: AdamW forgives a wrong factor of the gradient, its norm does not.
    settings = replace(SETTINGS, batch=7, clip=1e9)
    curves: list[list[StepRecord]] = [[], []]

    def trained(name: str, number: int, settings: TrainSettings) -> TrainResult:
        output = tmp_path / name
        return train_model(config, settings, tokens=[tokens], output=output, watch=Recorder(curves[number]))

    alone, on_ranks = trained("alone", 0, settings), trained("ranks", 1, replace(settings, ranks=ranks))
    for have, want in zip(curves[1], curves[0], strict=True):
        assert have.loss == pytest.approx(want.loss, rel=1e-4)
        assert have.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-3)
    for (_, have_loss), (_, want_loss) in zip(on_ranks.outcome.held_out, alone.outcome.held_out, strict=True):
        assert have_loss == pytest.approx(want_loss, rel=1e-4)
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


def standard_model(family: str) -> Any:
    """A tiny model of transformers whose head is its embedding, with weights far from the first ones."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    llama: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    model = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_positions=32, n_embd=48, n_layer=2, n_head=6, bos_token_id=0, eos_token_id=0)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**llama)),
        "untied": lambda: LlamaForCausalLM(LlamaConfig(**llama | {"tie_word_embeddings": False})),
    }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


WHOLE_MODELS = {
    "gpt2": KrakenConfig(layers=2, width=48, heads=6, degree=1, expansion=4.0, vocabulary=64, context=32),
    "llama": KrakenConfig(
        layers=2,
        width=48,
        heads=6,
        kv_heads=3,
        degree=1,
        expansion=112 / 48,
        vocabulary=64,
        context=32,
        norm="rms",
        ffn="swiglu",
        positions="rotary",
        norm_epsilon=1e-6,
    ),
}


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_a_model_of_one_whole_lane_is_the_standard_one(family: str) -> None:
    standard = standard_model(family)
    ids = torch.randint(64, (4, 20))
    # The projection turns the stream; with its norms' factors that is exact where these are one.
    model = upcycled(WHOLE_MODELS[family], capture(standard), ids)
    want = standard(ids).logits
    assert (model(ids) - want).abs().max() < 0.3 * want.abs().max()
    with torch.no_grad():
        for name, parameter in standard.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.copy_(torch.zeros_like(parameter) if name.endswith("bias") else torch.ones_like(parameter))
    model = upcycled(WHOLE_MODELS[family], capture(standard), ids)
    torch.testing.assert_close(model(ids), standard(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_a_standard_models_weights_are_a_better_beginning(family: str, tmp_path: Path) -> None:
    standard, rows = standard_model(family), torch.randint(64, (40, 24))
    # Most checkpoints are bfloat16; what is compared is computed in float32.
    standard.to(torch.bfloat16).save_pretrained(tmp_path / "standard")
    # What the standard model says itself is what its weights are good for.
    with torch.no_grad():
        rows[:, 1:] = standard(rows).logits[:, :-1].argmax(-1)
    np.save(tmp_path / "tokens.npy", rows.numpy())
    config = replace(WHOLE_MODELS[family], degree=2, width=32, heads=4, kv_heads=2 if family == "llama" else None)
    common = {"tokens": [tmp_path / "tokens.npy"], "teacher": tmp_path / "standard"}
    scratch = train_model(config, SETTINGS, output=tmp_path / "scratch", **common)
    begun = train_model(config, SETTINGS, output=tmp_path / "begun", begin=tmp_path / "standard", **common)
    assert begun.outcome.before["kl"] < 0.9 * scratch.outcome.before["kl"]


def test_a_standard_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    ids = torch.randint(64, (4, 20))
    llama = WHOLE_MODELS["llama"]
    sources = {family: capture(standard_model(family)) for family in ("qwen3", "untied", "llama", "gpt2")}
    for family, config, match in (
        ("qwen3", llama, "computes something that no Kraken model does|other norms than one before"),
        ("untied", llama, "computes something that no Kraken model does"),
        ("llama", replace(llama, rotary_base=500.0), "computes something that no Kraken model does"),
        ("llama", replace(llama, layers=3), "layers: 2 in that model, 3 in the one that is trained"),
        ("llama", replace(llama, width=36, heads=3, kv_heads=3), "width of a head: 8 in that model, 12"),
        ("llama", replace(llama, norm_epsilon=1e-5), "norm_epsilon: 1e-06 in that model, 1e-05"),
        ("gpt2", replace(WHOLE_MODELS["gpt2"], norm="rms"), "norms that subtract the mean: 1 in that model, 0"),
    ):
        with pytest.raises((UsageError, UnsupportedModelError), match=match):
            upcycled(config, sources[family], ids)
    standard_model("llama").save_pretrained(tmp_path / "standard")
    np.save(tmp_path / "tokens.npy", np.zeros(900, dtype=np.int64))
    with pytest.raises(UsageError, match=r"--teacher .*: has 64 tokens, the model that is trained 50"):
        train_model(
            replace(llama, vocabulary=50),
            SETTINGS,
            tokens=[tmp_path / "tokens.npy"],
            teacher=tmp_path / "standard",
            output=tmp_path / "model",
        )


@pytest.mark.slow
def test_ranks_distil_what_one_process_does(tmp_path: Path) -> None:
    standard_model("gpt2").save_pretrained(tmp_path / "standard")
    np.save(tmp_path / "tokens.npy", np.arange(2000) % 64)
    config = replace(WHOLE_MODELS["gpt2"], degree=2, width=32, heads=4)
    common = dict.fromkeys(("begin", "teacher"), tmp_path / "standard") | {"tokens": [tmp_path / "tokens.npy"]}
    alone = train_model(config, SETTINGS, output=tmp_path / "alone", **common)
    for ranks in (2, 3):
        on_ranks = train_model(config, replace(SETTINGS, ranks=ranks), output=tmp_path / f"ranks-{ranks}", **common)
        assert on_ranks.outcome.after["kl"] == pytest.approx(alone.outcome.after["kl"], rel=1e-4)
        for have, want in zip(_weights(on_ranks), _weights(alone), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("count", "each", "lanes"), [(6, 4, 2), (6, 2, 2), (3, 3, 4), (112, 20, 3), (10, 16, 3)])
def test_whatever_lanes_take_together_counts_once(count: int, each: int, lanes: int) -> None:
    heads = upcycle._spread(count, each, lanes)
    assert all(len(row) == each for row in heads)
    shares = torch.zeros(count)
    for row in heads:
        for head, shared in row:
            shares[head] += 1 / shared
    torch.testing.assert_close(shares[shares > 0], torch.ones(int((shares > 0).sum())))
    columns = torch.zeros(count)
    for chosen, part in upcycle._dealt(torch.randperm(count), each, lanes):
        columns.index_add_(0, chosen, part)
    taken = columns > 0
    torch.testing.assert_close(columns[taken], torch.ones(int(taken.sum())))
    if each * lanes >= count:
        assert bool(taken.all())
        assert bool((shares > 0).all())
