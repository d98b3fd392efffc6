"""A head and an embedding that the config ties or does not, beside files that hold one, both or neither."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError
from tests.reports.model_directories import (
    assert_as_loaded,
    assert_reads,
    configure,
    make,
    save,
    tensors_of,
    write_tensors,
)

pytestmark = pytest.mark.slow

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def sources(directory: Path) -> set[str]:
    """The tensors that the lanes read for their head and embedding."""
    return {spec.source for spec in capture(directory).program.weights.values()} & {HEAD, EMBEDDING}


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3"])
def test_a_tied_config_beside_a_head_of_its_own(tmp_path: Path, kind: str) -> None:
    save(tmp_path, kind, tie_word_embeddings=False, head_dim=8)
    # Gemma's class ties when the config is silent.
    configure(tmp_path, tie_word_embeddings=None if kind == "gemma" else True)
    notes = assert_as_loaded(tmp_path) if kind == "llama" else assert_reads(tmp_path)
    assert sources(tmp_path) == {HEAD, EMBEDDING}
    assert any(f"ties '{HEAD}' to '{EMBEDDING}', but the files hold different values" in note for note in notes)


def test_a_head_that_equals_the_embedding(tmp_path: Path) -> None:
    save(tmp_path, "qwen2", tie_word_embeddings=True)
    tensors = tensors_of(tmp_path)
    write_tensors(tmp_path, tensors | {HEAD: tensors[EMBEDDING]})
    assert assert_reads(tmp_path) == []
    assert len(sources(tmp_path)) == 1


def test_equal_in_the_type_that_is_loaded(tmp_path: Path) -> None:
    """What the config's type rounds away is no difference."""
    save(tmp_path, tie_word_embeddings=True)
    tensors = tensors_of(tmp_path)
    write_tensors(tmp_path, tensors | {HEAD: tensors[EMBEDDING] * (1 + 2**-12)})
    assert len(sources(tmp_path)) == 2
    configure(tmp_path, dtype="bfloat16")
    embedding = tensors[EMBEDDING].bfloat16()
    write_tensors(tmp_path, tensors | {EMBEDDING: embedding, HEAD: embedding.float() * (1 + 2**-12)})
    assert len(sources(tmp_path)) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("held", [HEAD, EMBEDDING])
def test_only_one_of_the_two(tmp_path: Path, held: str) -> None:
    save(tmp_path, tie_word_embeddings=True)
    tensors = tensors_of(tmp_path)
    tensors[held] = tensors.pop(EMBEDDING)
    write_tensors(tmp_path, tensors)
    assert assert_reads(tmp_path) == []


@pytest.mark.parametrize("tied", [False, None])
def test_an_untied_config_without_a_head(tmp_path: Path, tied: bool | None) -> None:
    """Llama's class does not tie when the config is silent; transformers makes up a head."""
    save(tmp_path, tie_word_embeddings=True)
    configure(tmp_path, tie_word_embeddings=tied)
    message = f"'{HEAD}' of the model is missing .*the config does not tie it to '{EMBEDDING}'"
    for require_weights in (True, False):
        with pytest.raises(InputFileError, match=message):
            capture(tmp_path, require_weights=require_weights)


def test_neither(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    tensors = tensors_of(tmp_path)
    del tensors[EMBEDDING]
    write_tensors(tmp_path, tensors)
    with pytest.raises(InputFileError, match="of the model is missing"):
        capture(tmp_path)


def bert(directory: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.BertConfig(**sizes, intermediate_size=48, initializer_range=0.2)
    transformers.BertForMaskedLM(config).save_pretrained(directory)
    return tensors_of(directory)


@pytest.mark.parametrize("own", ["decoder.weight", "decoder.bias"])
def test_an_encoder_whose_decoder_has_values_of_its_own(tmp_path: Path, own: str) -> None:
    tensors = bert(tmp_path)
    shape = (64, 32) if own == "decoder.weight" else (64,)
    write_tensors(tmp_path, tensors | {f"cls.predictions.{own}": torch.randn(shape)})
    notes = assert_reads(tmp_path, transformers.BertForMaskedLM)
    assert any(f"ties 'cls.predictions.{own}'" in note for note in notes)


def test_an_encoder_that_only_has_the_decoders_bias(tmp_path: Path) -> None:
    tensors = bert(tmp_path)
    tensors["cls.predictions.decoder.bias"] = torch.randn(64)
    del tensors["cls.predictions.bias"]
    write_tensors(tmp_path, tensors)
    assert assert_reads(tmp_path, transformers.BertForMaskedLM) == []


@pytest.mark.parametrize("outer", [True, False])
def test_a_nested_config_that_says_otherwise(tmp_path: Path, outer: bool) -> None:
    """An inner config's flag says nothing about a head that the outer class has; transformers decides which counts."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": not outer}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=outer)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    tied = loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    ids = "input_ids=int64[2,9]"
    captured = capture(tmp_path, input_specs=[ids])
    read = {spec.source for spec in captured.program.weights.values()}
    ends = {name for name in read if name.endswith(("lm_head.weight", "embed_tokens.weight"))}
    assert len(ends) == (1 if tied else 2)
    for name in ends:
        torch.testing.assert_close(captured.store.read(name), loaded.state_dict()[name])


def test_pickles_hold_both_names(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    captured = capture(tmp_path, trust_pickle=True)
    assert captured.notes == ()
    assert len({spec.source for spec in captured.program.weights.values()} & {HEAD, EMBEDDING}) == 1


def test_several_names_of_one_tensor(tmp_path: Path) -> None:
    """One of them is enough; values that differ are of no model."""
    save(tmp_path)
    tensors = tensors_of(tmp_path)
    norm = tensors["model.norm.weight"]
    write_tensors(tmp_path, tensors | {"norm.weight": norm})
    assert_reads(tmp_path)
    write_tensors(tmp_path, tensors | {"norm.weight": norm + 1})
    with pytest.raises(
        InputFileError, match=r"'model\.norm\.weight' of the model is in the files more than once"
    ) as caught:
        kraken_compiler.transform(tmp_path, degree=2)
    assert re.search(r"'model\.norm\.weight' in model\.safetensors, 'norm\.weight' in", str(caught.value))
