"""Directories of encoder-decoders: compiled, verified and called like the model that transformers loads from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kraken_compiler
from kraken_compiler.cli.compile import app as compile_app
from kraken_compiler.cli.verify import app as verify_app
from kraken_compiler.verify.compare import errors
from tests.cli_command import Command
from tests.reports.small_models import TOLERANCE, tokens
from tests.table_notes import note
from tests.test_cli_run import printed, refused

pytestmark = pytest.mark.slow

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 97}
_T5: dict[str, Any] = {**_IDS, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 6}
_BART: dict[str, Any] = {
    **_IDS,
    "pad_token_id": 0,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 48,
}
_POSITIONS = {"max_position_embeddings": 32}
_SOUND = {"num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 32}

MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
    "t5_untied": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART, **_POSITIONS)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**_BART, **_POSITIONS)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**_BART, **_POSITIONS)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_BART, **_SOUND)),
}


def saved(name: str, directory: Path) -> transformers.PreTrainedModel:
    """A random model whose directory is written; as transformers loads it from there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    if name == "bart":
        model.generation_config.forced_bos_token_id = 0
    model.save_pretrained(directory)
    loaded: transformers.PreTrainedModel = type(model).from_pretrained(directory).eval()
    return loaded


def inputs(name: str, batch: int, source: int, target: int) -> dict[str, Tensor]:
    if name == "whisper":
        first = {"input_features": torch.randn(batch, 16, 24, generator=torch.Generator().manual_seed(source))}
    else:
        first = {"input_ids": tokens(batch, source)}
    return {**first, "decoder_input_ids": tokens(batch, target, seed=1)}


@pytest.mark.parametrize(("name", "degree"), list(zip(MODELS, (2, 4, 2, 3, 2, 4))))
def test_a_directory_is_the_model_that_transformers_loads(name: str, degree: int, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model")
    lanes = kraken_compiler.transform(tmp_path / "model", degree, "standard")
    found = []
    for size in ((1, 9, 4), (3, 5, 13)):
        given = inputs(name, *size)
        with torch.no_grad():
            have, want = lanes(**given).logits, model(**given, use_cache=False).logits
        found.append(errors(have, want)[1])
    note("directories", name, degree=degree, error=max(found))
    assert max(found) <= TOLERANCE


def test_compiled_and_verified_from_the_command_line(tmp_path: Path) -> None:
    saved("t5", tmp_path / "t5")
    answer = Command(compile_app).answer(tmp_path / "t5", "--degree", "2", "-o", tmp_path / "t5.kraken")
    assert all(one["passed"] for one in answer["verification"]["program"]["comparisons"])
    # A changed form's cost is told: the encoder reads the text that the decoder continues.
    assert answer["verification"]["quality"]["kl"] > 0
    again = Command(verify_app).answer(tmp_path / "t5.kraken")
    assert all(one["passed"] for one in again["program"]["comparisons"])


def test_what_a_text_cannot_give_is_said(tmp_path: Path) -> None:
    saved("whisper", tmp_path / "whisper")
    answer = Command(compile_app).answer(tmp_path / "whisper", "--degree", "2", "-o", tmp_path / "whisper.kraken")
    assert answer["verification"]["skipped"] == [
        "no quality measurement: a text is all there is, and the model also reads 'input_features'"
    ]
    said = Command(compile_app).refused(
        2, tmp_path / "whisper", "--degree", "2", "--calibrate", __file__, "-o", tmp_path / "calibrated.kraken"
    )
    assert "the model also reads 'input_features'" in said


def test_a_config_that_names_no_class(tmp_path: Path) -> None:
    model = saved("bart", tmp_path / "bart")
    config = tmp_path / "bart" / "config.json"
    config.write_text(config.read_text().replace('"BartForConditionalGeneration"', ""))
    lanes = kraken_compiler.transform(tmp_path / "bart", 2, "standard")
    given = inputs("bart", 2, 6, 3)
    with torch.no_grad():
        assert errors(lanes(**given).logits, model(**given, use_cache=False).logits)[1] <= TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_answers_are_those_of_transformers(backend: str, tmp_path: Path) -> None:
    model = saved("bart", tmp_path / "bart")
    made = tmp_path / "bart.kraken"
    arguments = (tmp_path / "bart", "--degree", "2", "--form", "standard", "--backend", backend)
    Command(compile_app).answer(*arguments, "--no-verify", "-o", made)
    prompts = [[5, 9, 40, 7], [60, 3]]
    given = (part for ids in prompts for part in ("--input-ids", ",".join(map(str, ids))))
    answer = json.loads(printed(made, *given, "--max-new-tokens", "6", "--json"))
    begin = [1, 0]
    for prompt, result in zip(prompts, answer["results"], strict=True):
        written = list(begin)
        for _ in range(6):
            with torch.no_grad():
                output = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([written]), use_cache=False)
            written.append(int(output.logits[0, -1].argmax()))
        assert result["ids"] == written[len(begin) :]
    assert "positions" in refused(2, made, "--input-ids", "5," * 40 + "5", "--max-new-tokens", "2")
