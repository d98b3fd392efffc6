"""Adapters beside a model, and directories that hold nothing else: transformers applies them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError, UnsupportedModelError, UsageError
from tests.reports.model_directories import TOLERANCE, configure, error, make, save, tensors_of, write_tensors

pytestmark = pytest.mark.slow


def save_adapter(base: Path, directory: Path, kind: str = "llama", config: Any = None, **sizes: Any) -> Path:
    """An adapter of seeded numbers that all count."""
    torch.manual_seed(1)
    config = config or peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make(kind, **sizes), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * (0.05 if "lora_magnitude" in name else 0.3))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def put_beside(adapter: Path, base: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base / name)


def assert_applied(directory: Path, plain: Any) -> None:
    """The lanes compute what transformers loads, which is not the model without the adapter."""
    lanes = kraken_compiler.transform(directory, degree=2, form="standard")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert error(plain, model) > 1e-2
    assert error(lanes, model) < TOLERANCE[torch.float32]
    assert f"note      the adapter in {directory} is merged into the weights" in lanes.report.lines()


CONFIGS: dict[str, Any] = {
    "lora": None,
    "ffn, rank-stabilised": peft.LoraConfig(
        r=2, target_modules=["up_proj", "down_proj", "o_proj"], use_rslora=True, lora_alpha=3, task_type="CAUSAL_LM"
    ),
    "a head of its own": peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "scales": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_beside_the_weights(tmp_path: Path, kind: str) -> None:
    base = save(tmp_path / "base")
    put_beside(save_adapter(base, tmp_path / "adapter", config=CONFIGS[kind]), base)
    assert_applied(base, make())


def test_rows_of_an_embedding(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[4, 5, 9], task_type="CAUSAL_LM")
    put_beside(save_adapter(base, tmp_path / "adapter", config=config), base)
    assert_applied(base, make())


def test_two_parameters_of_one_module(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 2}
    base = save(tmp_path / "base", "mixtral", **sizes)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM")
    put_beside(save_adapter(base, tmp_path / "adapter", "mixtral", config, **sizes), base)
    assert_applied(base, make("mixtral", **sizes))


def test_an_adapter_that_depends_on_tokens(tmp_path: Path) -> None:
    """It acts from certain tokens on, which no weight does."""
    base = save(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    put_beside(save_adapter(base, tmp_path / "adapter", config=config), base)
    with pytest.raises(UnsupportedModelError, match="cannot be merged: aLoRA"):
        capture(base)


def test_an_update_of_a_tied_head_is_none_of_the_embedding(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"], task_type="CAUSAL_LM")
    put_beside(save_adapter(base, tmp_path / "a", "qwen2", config, tie_word_embeddings=True), base)
    assert_applied(base, make("qwen2", tie_word_embeddings=True))


def test_a_base_whose_config_and_files_differ(tmp_path: Path) -> None:
    """What is decided of the base holds under an adapter, too."""
    base = save(tmp_path / "base")
    put_beside(save_adapter(base, tmp_path / "adapter"), base)
    configure(base, tie_word_embeddings=True)
    lanes = kraken_compiler.transform(base, degree=2, form="standard")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert error(lanes, model) < TOLERANCE[torch.float32]
    tensors = tensors_of(base)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    write_tensors(base, tensors)
    with pytest.raises(InputFileError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' of the model is missing"):
        capture(base)


def test_nothing_but_an_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    assert_applied(adapter, make())
    # An adapter beside the base is another one, which is not applied.
    put_beside(save_adapter(base, tmp_path / "other", config=CONFIGS["a head of its own"]), base)
    assert_applied(adapter, make())


def test_an_adapter_whose_model_is_elsewhere(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/model"}))
    with pytest.raises(
        InputFileError, match=r"an adapter, not a model, and its base model 'some/model' is no model dir"
    ):
        capture(adapter)
    # With a model beside it, that is the base, whatever the adapter says.
    put_beside(adapter, base)
    assert_applied(base, make())


def test_what_a_plan_says(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    put_beside(save_adapter(base, tmp_path / "adapter"), base)
    (base / "model.safetensors").unlink()
    captured = capture(base, require_weights=False)
    assert captured.notes == (f"the adapter in {base} will be merged into the weights",)


def test_pickled_adapters_need_trust(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    put_beside(save_adapter(base, tmp_path / "adapter"), base)
    shutil.copytree(base, tmp_path / "safe")
    torch.save(tensors_of(base, "adapter_model.safetensors"), base / "adapter_model.bin")
    (base / "adapter_model.safetensors").unlink()
    with pytest.raises(InputFileError, match=r"adapter_model\.bin is a pickle, .*--trust-pickle"):
        capture(base)
    captured = capture(base, trust_pickle=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "safe")
    layer = model.model.layers[0].self_attn.q_proj
    layer.merge()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(captured.store.read(name), layer.get_base_layer().weight.detach())


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    put_beside(save_adapter(base, tmp_path / "adapter"), base)
    tensors = tensors_of(base, "adapter_model.safetensors")
    first = sorted(tensors)[0]
    less = {name: value for name, value in tensors.items() if name != first}
    more = tensors | {first.replace("layers.0", "layers.9"): tensors[first]}
    other = tensors | {first: torch.ones(5, 5)}
    for changed, message in (
        (less, "does not find 1 tensors"),
        (more, "finds no place for 1 tensors"),
        (other, "its adapter cannot be applied to the model|in another shape"),
    ):
        write_tensors(base, changed, "adapter_model.safetensors")
        with pytest.raises(InputFileError, match=message) as caught:
            capture(base)
        assert "\n" not in str(caught.value)
    (base / "adapter_model.safetensors").unlink()
    with pytest.raises(InputFileError, match=r"holds an adapter_config\.json and no adapter_model\.safetensors"):
        capture(base)


def test_an_adapter_of_which_transformers_reads_a_part(tmp_path: Path) -> None:
    """Magnitudes (DoRA): peft reads them, transformers gives them the values that they begin with."""
    base = save(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "gate_proj"], use_dora=True, task_type="CAUSAL_LM")
    adapter = save_adapter(base, tmp_path / "adapter", config=config)
    put_beside(adapter, base)
    with pytest.raises(InputFileError, match=r"does not find 2 tensors .*lora_magnitude_vector.*merge it with peft"):
        capture(base)


def test_an_adapter_that_is_no_update_of_weights(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    put_beside(save_adapter(base, tmp_path / "adapter", config=config), base)
    with pytest.raises(InputFileError, match="its adapter cannot be applied to the model") as caught:
        capture(base)
    assert "\n" not in str(caught.value)


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base")
    put_beside(save_adapter(base, tmp_path / "adapter"), base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"reading the adapter in .* needs .*kraken-compiler\[heal\]"):
        capture(base)
