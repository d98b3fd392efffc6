"""Capture of Hugging Face directories: lazy weights, names in checkpoints, and every damaged input."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import InputFileError, UnsupportedModelError, UsageError
from kraken_compiler.lanes.calling import bind, unflatten_output

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
}


def make(kind: str = "llama", **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **sizes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tied Llama and the directory it was saved to."""
    model = make(tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return model, path


@pytest.fixture
def directory(saved: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy of the saved model that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "model"))


def run(captured: Capture, *args: Any, **kwargs: Any) -> Any:
    program = captured.program
    read = program.reader(captured.store.read)
    weights = [read(spec.source) for spec in program.weights.values()]
    with torch.no_grad():
        outputs = program.module(*weights, *bind(program.call, program.inputs, args, kwargs))
    return unflatten_output(program.call, outputs)


def assert_same(captured: Capture, model: Any) -> None:
    ids = torch.randint(0, 96, (3, 9))
    out = run(captured, ids)
    with torch.no_grad():
        reference = model(input_ids=ids)
    torch.testing.assert_close(out.logits, reference.logits)
    assert type(out) is type(reference)


def test_values_names_and_config(saved: tuple[Any, Path]) -> None:
    model, path = saved
    captured = capture(path)
    assert_same(captured, model)
    assert captured.origin.kind == "huggingface"
    assert captured.origin.model_class.endswith(".LlamaForCausalLM")
    assert captured.config is not None
    assert captured.config["hidden_size"] == 32
    assert captured.program.inputs[0].shape == ("batch", "sequence")
    assert captured.program.call.constants == {"use_cache": False}
    devices = {str(n.meta["val"].device) for n in captured.program.graph.nodes if hasattr(n.meta.get("val"), "device")}
    assert devices == {"cpu"}
    assert not any(value.device.type == "meta" for value in captured.program.constants.values())
    assert captured.origin.tokenizer is None


def test_the_live_model_gives_the_same_program(saved: tuple[Any, Path]) -> None:
    model, path = saved
    live = capture(model)
    assert_same(live, model)
    assert model.config.use_cache is not False
    assert list(live.program.weights) == list(capture(path).program.weights)


def test_no_weights_are_needed_for_planning(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    captured = capture(directory, require_weights=False)
    assert len(captured.program.weights) > 10
    with pytest.raises(InputFileError, match=r"has no weight files \(\*\.safetensors\), only a config"):
        captured.store.read("model.norm.weight")
    with pytest.raises(InputFileError, match=r"has no weight files \(\*\.safetensors\), only a config"):
        capture(directory)


def test_element_types(directory: Path) -> None:
    captured = capture(directory, dtype=torch.bfloat16)
    assert {spec.dtype for spec in captured.program.weights.values() if spec.kind == "parameter"} == {"bfloat16"}
    assert captured.store.read("model.norm.weight").dtype == torch.bfloat16
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert capture(directory).program.weights["p_model_norm_weight"].dtype == "float32"


def test_sharded_checkpoint(saved: tuple[Any, Path], tmp_path: Path) -> None:
    saved[0].save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    captured = capture(tmp_path)
    assert_same(captured, saved[0])
    before = captured.origin.sha256
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    assert capture(tmp_path).origin.sha256 != before
    shards[1].unlink()
    with pytest.raises(InputFileError, match=rf"1 of {len(shards)} weight files are missing \({shards[1].name}\)"):
        capture(tmp_path)


@pytest.mark.parametrize(
    "rename", [lambda name: name.removeprefix("model."), lambda name: name], ids=["base model's names", "own names"]
)
def test_prefixes_and_tied_names(directory: Path, saved: tuple[Any, Path], rename: Callable[[str], str]) -> None:
    file = directory / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    assert_same(capture(directory), saved[0])


def test_head_only_name_of_a_tied_weight(directory: Path, saved: tuple[Any, Path]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert_same(capture(directory), saved[0])


def test_missing_tensor(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(
        InputFileError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* missing from .*model\.safetensors"
    ):
        capture(directory)


def test_wrong_shape_and_element_type(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": torch.ones(31)}, file)
    with pytest.raises(
        InputFileError, match=r"model\.safetensors: tensor 'model\.norm\.weight' has shape \[31\].*\[32\]"
    ):
        capture(directory)
    save_file(tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, file)
    with pytest.raises(InputFileError, match=r"'model\.norm\.weight' is int8, the model needs float32"):
        capture(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], r"is truncated: its header describes \d+ bytes, the file has \d+"),
        (lambda content: content[:100], "is truncated or no safetensors file: its header is incomplete"),
        (lambda content: b"", "is truncated or no safetensors file"),
        (lambda content: content[:8] + b"x" * (len(content) - 8), "is damaged or no safetensors file"),
    ],
    ids=["short data", "short header", "empty", "garbage"],
)
def test_damaged_weights(directory: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputFileError, match=message) as caught:
        capture(directory)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("{", InputFileError, r"config\.json is damaged"),
        ("[]", InputFileError, "it is no JSON object"),
        ({"model_type": "nonesuch"}, UnsupportedModelError, "does not know the architecture .*'nonesuch'"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "its weights are quantized"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}},
            UnsupportedModelError,
            "Python code next to the weights .*never executed",
        ),
        ({"num_attention_heads": 0}, InputFileError, "does not describe a model that can be built"),
    ],
)
def test_bad_configs(directory: Path, change: str | dict[str, Any], error: type[Exception], message: str) -> None:
    file = directory / "config.json"
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(error, match=message) as caught:
        capture(directory)
    assert "\n" not in str(caught.value)


def test_pickled_weights_need_trust(directory: Path, saved: tuple[Any, Path]) -> None:
    file = directory / "model.safetensors"
    torch.save(load_file(file), directory / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(
        InputFileError, match=r"pytorch_model\.bin, a pickle, .*safe_serialization=True.*--trust-pickle"
    ):
        capture(directory)
    captured = capture(directory, trust_pickle=True)
    assert_same(captured, saved[0])
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(InputFileError, match=r"cannot read .*pytorch_model\.bin"):
        capture(directory, trust_pickle=True)


def test_encoder_decoders_are_captured_with_a_source_and_a_target(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=32)
    config.save_pretrained(tmp_path)
    for source in (tmp_path, transformers.T5ForConditionalGeneration(config)):
        captured = capture(source, require_weights=False)
        shapes = {spec.parameter: spec.shape for spec in captured.program.inputs}
        assert shapes == {
            "input_ids": ("batch", "sequence"),
            "decoder_input_ids": ("batch", "sequence_decoder_input_ids"),
        }


def test_the_class_that_the_config_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=96
    )
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    captured = capture(tmp_path)
    assert captured.origin.model_class.endswith("BertForMaskedLM")
    assert_same(captured, model)
    # Older checkpoints call a LayerNorm's parameters gamma and beta.
    file = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    assert_same(capture(tmp_path), model)


def test_image_models_are_inferred(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    program = capture(tmp_path).program
    assert program.inputs[0].parameter == "pixel_values"
    assert program.inputs[0].shape[0] == "batch"


def test_converted_tensors_are_made_on_read(tmp_path: Path) -> None:
    model = make("mixtral", num_local_experts=2, num_experts_per_tok=1)
    model.save_pretrained(tmp_path)
    assert any("experts.1.w1" in name for name in load_file(tmp_path / "model.safetensors"))
    captured = capture(tmp_path)
    for name in captured.store.names():
        torch.testing.assert_close(captured.store.read(name), model.state_dict()[name])


def test_own_inputs(saved: tuple[Any, Path]) -> None:
    model, path = saved
    captured = capture(path, input_specs=["input_ids=int64[2,16]", "attention_mask=int64[2,16]"])
    assert [spec.parameter for spec in captured.program.inputs] == ["input_ids", "attention_mask"]
    ids = torch.randint(0, 96, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        reference = model(ids, attention_mask=mask).logits
    out = run(captured, ids, attention_mask=mask).logits
    torch.testing.assert_close(out[1:], reference[1:])
    torch.testing.assert_close(out[0, 4:], reference[0, 4:])
    with pytest.raises(UsageError, match=r"compiled without the argument 'labels'"):
        run(captured, ids, attention_mask=mask, labels=ids)
    with pytest.raises(UsageError, match="compiled with use_cache=False"):
        run(captured, ids, attention_mask=mask, use_cache=True)


def test_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    source = capture(directory).origin.tokenizer
    assert source is not None
    assert source.load()("b a")["input_ids"] == [1, 0]
    (directory / "tokenizer.json").write_text("{")
    (directory / "tokenizer_config.json").write_text("{")
    assert source.load()("b a")["input_ids"] == [1, 0], "it is made once"
    damaged = capture(directory).origin.tokenizer
    assert damaged is not None
    with pytest.raises(InputFileError, match="the tokenizer cannot be loaded"):
        damaged.load()


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"has no config\.json, so it is no Hugging Face model directory"):
        capture(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputFileError, match="holds an adapter, not a model"):
        capture(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputFileError, match=r"give the file itself, .*m\.gguf"):
        capture(tmp_path)


def test_missing_packages_are_no_fault_of_the_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"reading the Hugging Face directory .* needs .*pip install"):
        capture(directory)
