"""What ends a text: the tokenizer's token, the generation config's, and where that names none, the model's config's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.artifact.tokenizer_files import generation_config, read_tokenizer
from kraken_compiler.capture import capture
from kraken_compiler.capture.captured_model import TokenizerSource
from kraken_compiler.commands.source_record import source_record
from kraken_compiler.errors import InputFileError
from kraken_compiler.generate.tokenizer import TextCodec
from tests.reports.text_functions import END, said, with_tokenizer
from tests.test_cli_compile import save_model
from tests.test_runtime_text import tokenizer
from tests.toy_lane_program import edit_manifest, write_toy
from tests.zoo import SUPPORTED

EOS_40 = {"eos_token_id": 40}


def model_files(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None, eos: bool) -> Path:
    """A model's directory as far as its text is concerned."""
    made = tokenizer()
    if not eos:
        made.eos_token = None
    made.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": [7, 9]}, None, {7, 9}),
        ({"eos_token_id": [7, 9]}, {"temperature": 0.5}, {7, 9}),
        ({"eos_token_id": 7}, {"eos_token_id": None}, {7}),
        ({"eos_token_id": 7}, {"eos_token_id": []}, {7}),
        ({"eos_token_id": 7}, {"eos_token_id": 8}, {8}),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 10]}, {8, 10}),
        ({"text_config": {"eos_token_id": 11}}, None, {11}),
        ({"decoder": {"eos_token_id": 12}, "encoder": {"eos_token_id": 5}}, {}, {12}),
        ({"eos_token_id": 0, "text_config": {"eos_token_id": 11}}, None, {0}),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [11]}}, None, {11}),
        ({"eos_token_id": [7, 10**6, -1]}, None, {7, 10**6, -1}),
        ({"pad_token_id": 3, "bos_token_id": 4}, None, set()),
        ({}, None, set()),
    ],
)
def test_who_says_what_ends_a_text(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, stops: set[int], eos: bool
) -> None:
    found = TokenizerSource(str(model_files(tmp_path / "model", config, generation, eos)))
    assert found.check()[0] == ()
    codec = TextCodec.of(with_tokenizer(tmp_path / "artifact", found.save))
    assert codec.eos == stops | ({END} if eos else set())


def test_what_else_a_generation_config_says_is_kept(tmp_path: Path) -> None:
    source = model_files(tmp_path / "model", {"eos_token_id": 7}, {"temperature": 0.5, "top_k": 3}, eos=False)
    (tmp_path / "saved").mkdir()
    TokenizerSource(str(source)).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved == {"temperature": 0.5, "top_k": 3, "eos_token_id": 7}


def test_a_run_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = TokenizerSource(str(model_files(tmp_path / "model", {"eos_token_id": [7, 40]}, None, eos=False)))
    artifact = with_tokenizer(tmp_path / "artifact", found.save)
    said(artifact, [33, 34, 40, 35], prompt=["hi"], json=True)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["ids"], result["text"], result["finish_reason"]) == ([33, 34], "BC", "eos")
    said(artifact, [33, 34, 40, 35], prompt=["hi"], ignore_eos=True)
    assert capsys.readouterr().out == "BCID\n"


def test_token_ids_stop_where_text_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No tokenizer is loaded for them: what ends a text is the model's, and the artifact notes it."""
    toy = write_toy(tmp_path / "noted", 2)
    edit_manifest(toy, source={"kind": "module", "name": "toy", "stop_tokens": [7, 40]})
    noted = open_artifact(toy)
    older = with_tokenizer(
        tmp_path / "older", TokenizerSource(str(model_files(tmp_path / "model", EOS_40, {}, eos=False))).save
    )
    for artifact in (noted, older):
        said(artifact, [33, 34, 40, 35], input_ids=["1"], json=True)
        (result,) = json.loads(capsys.readouterr().out)["results"]
        assert (result["ids"], result["finish_reason"]) == ([33, 34], "eos")
        said(artifact, [33, 34, 40, 35], input_ids=["1"], ignore_eos=True)
        assert capsys.readouterr().out == "33,34,40,35\n"


def test_an_artifact_notes_what_ends_a_text(tmp_path: Path) -> None:
    model: Any = SUPPORTED["llama"]()
    save_model("llama", tmp_path / "plain", tokenizer=False)
    save_model("llama", tmp_path / "with")
    for place in ("plain", "with"):
        (tmp_path / place / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    tokenizers_own = read_tokenizer(tmp_path / "with").eos_token_id
    assert tokenizers_own not in (5, 9)
    model.generation_config.eos_token_id = [4, 6]
    noted = [
        source_record(capture(one), (), None).stop_tokens for one in (tmp_path / "plain", tmp_path / "with", model)
    ]
    assert noted == [(5, 9), tuple(sorted({5, 9, tokenizers_own})), (4, 6)]
    model.generation_config.eos_token_id = None
    assert source_record(capture(model), (), None).stop_tokens == (model.config.eos_token_id,)
    assert source_record(capture(nn.Linear(2, 2), example_inputs=(torch.zeros(2, 2),)), (), None).stop_tokens == ()


@pytest.mark.parametrize("value", ["7", 7.0, True, [7, None], {"id": 7}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_token(tmp_path: Path, value: Any, file: str) -> None:
    """Found before the weights are written."""
    given = {"eos_token_id": value}
    source = model_files(tmp_path / "model", given if file == "config.json" else {}, None, eos=True)
    if file != "config.json":
        (source / file).write_text(json.dumps(given))
    with pytest.raises(InputFileError, match=f"{file}: its eos_token_id is no token id"):
        generation_config(source)
    with pytest.raises(InputFileError, match="eos_token_id"):
        TokenizerSource(str(source)).check()


@pytest.mark.parametrize("content", ["{", "[]", "7", '"eos"'])
def test_a_generation_config_that_is_none(tmp_path: Path, content: str) -> None:
    source = model_files(tmp_path / "model", {}, None, eos=True)
    (source / "generation_config.json").write_text(content)
    with pytest.raises(InputFileError, match=r"generation_config\.json: damaged, no JSON"):
        TokenizerSource(str(source)).check()
