"""Float8 weights with scales: the reference is a plain model of the products, computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kraken_compiler
from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import InputFileError, UnsupportedModelError
from tests.reports.model_directories import (
    TOLERANCE,
    configure,
    error,
    make,
    save,
    tensors_of,
    write_index,
    write_tensors,
)

pytestmark = pytest.mark.slow

LARGEST = 448.0
"""The largest number of e4m3."""


def quantize(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as float8 and scales of blocks, and the product of the two, block by block."""
    count = (math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns))
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales, product = torch.empty(count), torch.empty(weight.shape)
    for i in range(count[0]):
        for j in range(count[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[block].abs().max() / LARGEST
            data[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            product[block] = data[block].float() * scales[i, j]
    return data, scales, product


def save_quantized(
    directory: Path, block: tuple[int, int] | None, kind: str = "llama", suffix: str = "_scale_inv", **sizes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantise the projections of a directory; what the files hold, and a plain model's tensors.

    Args:
        directory: Where.
        block: Rows and columns that share a scale; -1 is all of them; None is one number for all, without dims.
        kind: Of the model.
        suffix: What the scales' names end in.
        sizes: Of the model.
    """
    held = tensors_of(save(directory, kind, **sizes))
    plain = dict(held)
    for name in [name for name in held if "proj" in name or "experts" in name]:
        shape = held[name].shape
        rows, columns = (size if size > 0 else length for size, length in zip(block or (-1, -1), shape))
        held[name], scales, plain[name] = quantize(held[name], rows, columns)
        held[name + suffix] = scales if block is not None else scales.reshape(())
    write_tensors(directory, held)
    return held, plain


def loaded(kind: str, plain: dict[str, Tensor], directory: Path, **sizes: Any) -> Any:
    """The plain model, through a directory of its own: files and classes name some tensors differently."""
    model = make(kind, **sizes)
    model.save_pretrained(directory)
    write_tensors(directory, plain)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def assert_holds(captured: Capture, model: Any) -> None:
    """Every weight that is read, against the plain model's."""
    state = model.state_dict()
    for name in captured.store.names():
        want, whole = state[name], captured.store.read(name)
        torch.testing.assert_close(whole, want.to(whole.dtype), rtol=0, atol=0)
        rows = captured.store.read.rows_of(name)
        if rows is not None and want.dim():
            middle = slice(len(want) // 3, len(want) - 1)
            torch.testing.assert_close(rows.read(middle.start, middle.stop), whole[middle], rtol=0, atol=0)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def compressed(**weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors whose weights are described so."""
    group = COMPRESSED["config_groups"]["group_0"]
    return COMPRESSED | {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


@pytest.mark.parametrize(
    ("block", "suffix", "config"),
    [
        ((-1, -1), "_scale_inv", None),
        (None, "_scale", None),
        ((16, 16), "_scale_inv", FP8 | {"weight_block_size": [16, 16]}),
        # 48 rows or columns are one block and a half; the other sizes are whole ones.
        ((32, 32), "_scale_inv", FP8 | {"weight_block_size": [32, 32]}),
        ((20, 12), "_scale_inv", FP8 | {"weight_block_size": [20, 12]}),
        ((32, 32), "_scale_inv", None),
        ((-1, -1), "_scale_inv", FP8 | {"weight_block_size": None}),
        ((128, 128), "_scale_inv", FP8 | {"weight_block_size": [128, 128]}),
        ((1, -1), "_scale", COMPRESSED),
        (None, "_scale", COMPRESSED),
        ((16, 16), "_scale", COMPRESSED),
        # By the number of blocks they could be others.
        ((24, 20), "_scale", compressed(strategy="block", block_structure=[24, 20])),
        ((1, 24), "_scale", compressed(strategy="group", group_size=24)),
    ],
)
def test_products_by_hand(
    tmp_path: Path, block: tuple[int, int] | None, suffix: str, config: dict[str, Any] | None
) -> None:
    _, plain = save_quantized(tmp_path / "fp8", block, suffix=suffix)
    configure(tmp_path / "fp8", quantization_config=config)
    captured = capture(tmp_path / "fp8")
    assert_holds(captured, loaded("llama", plain, tmp_path / "plain"))
    assert captured.notes == (
        "7 weights are float8 with scales: they are read as their products; activations are not rounded to float8 (GPU "
        "kernels may)",
    )
    assert captured.config is not None
    assert "quantization_config" not in captured.config


def test_lanes_compute_with_the_products(tmp_path: Path) -> None:
    """Over degrees that cut blocks, in the type of the config; and as transformers does where it has no GPU."""
    _, plain = save_quantized(tmp_path / "fp8", (16, 16))
    configure(tmp_path / "fp8", quantization_config=FP8 | {"weight_block_size": [16, 16]}, dtype="bfloat16")
    model = loaded("llama", plain, tmp_path / "plain").bfloat16()
    lanes = kraken_compiler.transform(tmp_path / "fp8", degree=3, form="standard")
    assert {parameter.dtype for parameter in lanes.parameters()} == {torch.bfloat16}
    assert error(lanes, model) < TOLERANCE[torch.bfloat16]
    if not torch.cuda.is_available():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], value, rtol=0, atol=0)


def test_rows_of_scales_without_a_dim_for_columns(tmp_path: Path) -> None:
    held, plain = save_quantized(tmp_path / "fp8", (1, -1), suffix="_scale")
    write_tensors(tmp_path / "fp8", {name: v.flatten() if name.endswith("_scale") else v for name, v in held.items()})
    assert_holds(capture(tmp_path / "fp8"), loaded("llama", plain, tmp_path / "plain"))


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    held, plain = save_quantized(tmp_path / "fp8", (16, 16))
    for name in [name for name in held if name.endswith("_scale_inv")]:
        exponents = held[name].log2().round()
        weight = name.removesuffix("_scale_inv")
        spread = exponents.exp2().repeat_interleave(16, 0).repeat_interleave(16, 1)
        plain[weight] = held[weight].float() * spread
        held[name] = exponents.exp2().to(torch.float8_e8m0fnu)
    write_tensors(tmp_path / "fp8", held)
    model = loaded("llama", plain, tmp_path / "plain")
    assert_holds(capture(tmp_path / "fp8"), model)
    exponents_only = {name: v.view(torch.uint8) if name.endswith("_inv") else v for name, v in held.items()}
    write_tensors(tmp_path / "fp8", exponents_only)
    config = FP8 | {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    configure(tmp_path / "fp8", quantization_config=config)
    assert_holds(capture(tmp_path / "fp8"), model)
    configure(tmp_path / "fp8", quantization_config=config | {"scale_fmt": None})
    with pytest.raises(InputFileError, match=r"the scale '.*weight_scale_inv' is of a type that is not supported"):
        capture(tmp_path / "fp8")


def test_experts(tmp_path: Path) -> None:
    """Merged while they are read: every expert is a tensor of the files."""
    sizes: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    _, plain = save_quantized(tmp_path / "fp8", (16, 16), "qwen3_moe", **sizes)
    configure(tmp_path / "fp8", quantization_config=FP8 | {"weight_block_size": [16, 16]})
    assert_holds(capture(tmp_path / "fp8"), loaded("qwen3_moe", plain, tmp_path / "plain", **sizes))


def test_scales_of_activations_are_not_needed(tmp_path: Path) -> None:
    held, plain = save_quantized(tmp_path / "fp8", None, suffix="_scale")
    scales = {name.replace("weight_scale", "input_scale"): torch.tensor(1.0) for name in held if "_scale" in name}
    scales |= {f"model.layers.0.self_attn.{part}_proj.{part}_scale": torch.tensor(1.0) for part in "kv"}
    write_tensors(tmp_path / "fp8", held | scales)
    captured = capture(tmp_path / "fp8")
    assert_holds(captured, loaded("llama", plain, tmp_path / "plain"))
    assert len(captured.notes) == 1


def test_weights_without_scales(tmp_path: Path) -> None:
    """All of them: the numbers are the weights. Some of them, or beside tensors that may be scales: nobody knows."""
    directory = tmp_path / "fp8"
    held, _ = save_quantized(directory, (-1, -1))
    bare = {name: value for name, value in held.items() if not name.endswith("_scale_inv")}
    write_tensors(directory, bare)
    captured = capture(directory)
    assert_holds(captured, transformers.AutoModelForCausalLM.from_pretrained(directory))
    assert captured.notes == ("7 weights are float8 without scales: their numbers are taken as they are",)

    write_tensors(directory, bare | {"scales.of.layer.0": torch.ones(7)})
    with pytest.raises(
        InputFileError, match="is float8 without a scale that we know, and 1 tensors of the files are not"
    ):
        capture(directory)

    name = next(name for name in held if name.endswith("_scale_inv"))
    write_tensors(directory, {key: value for key, value in held.items() if key != name})
    with pytest.raises(InputFileError, match=f"'{name.removesuffix('_scale_inv')}' is float8 without a scale"):
        capture(directory)

    write_tensors(directory, bare)
    configure(directory, quantization_config=FP8 | {"weight_block_size": [16, 16]})
    with pytest.raises(InputFileError, match="7 weights are float8 without a scale"):
        capture(directory)


def test_blocks_of_sizes_that_nobody_names(tmp_path: Path) -> None:
    """32 and 48 rows in two blocks each: no power of two makes both."""
    save_quantized(tmp_path, (24, 48))
    with pytest.raises(InputFileError, match=r"has blocks of \d+ and '.*' of \d+: the config must say how large"):
        capture(tmp_path)


def test_scales_in_a_file_that_is_not_read(tmp_path: Path) -> None:
    """The index was written before the scales were."""
    held, _ = save_quantized(tmp_path, (-1, -1))
    (tmp_path / "model.safetensors").unlink()
    scales = {name: value for name, value in held.items() if name.endswith("_scale_inv")}
    rest = {name: value for name, value in held.items() if name not in scales}
    write_index(tmp_path, {"model-00001-of-00002.safetensors": rest})
    write_tensors(tmp_path, scales, "model-00002-of-00002.safetensors")
    with pytest.raises(InputFileError, match=r"without a scale, and model-00002-of-00002.* is not read"):
        capture(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz])
def test_other_float8_types(tmp_path: Path, dtype: torch.dtype) -> None:
    held, plain = save_quantized(tmp_path / "fp8", (-1, -1))
    name = "model.layers.0.mlp.up_proj.weight"
    held[name] = (held[name].float() / 4).to(dtype)
    plain[name] = held[name].float() * held[f"{name}_scale_inv"]
    write_tensors(tmp_path / "fp8", held)
    assert_holds(capture(tmp_path / "fp8"), loaded("llama", plain, tmp_path / "plain"))


def test_scales_that_fit_nothing(tmp_path: Path) -> None:
    held, _ = save_quantized(tmp_path, (16, 16))
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    for shape in ((5, 2), (3, 2, 1), (7,)):
        write_tensors(tmp_path, held | {name: torch.ones(shape)})
        with pytest.raises(InputFileError, match="does not say which parts of the weight"):
            capture(tmp_path)
    write_tensors(tmp_path, held)
    configure(tmp_path, quantization_config=FP8 | {"weight_block_size": [8, 8]})
    with pytest.raises(InputFileError, match="does not say which parts of the weight"):
        capture(tmp_path)


def test_a_scale_beside_a_weight_that_is_not_float8(tmp_path: Path) -> None:
    held, plain = save_quantized(tmp_path, (16, 16))
    name = "model.layers.0.mlp.up_proj.weight"
    write_tensors(tmp_path, held | {name: plain[name]})
    with pytest.raises(InputFileError, match=rf"'{name}_scale_inv' belongs to '{name}'"):
        capture(tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        (COMPRESSED | {"format": "pack-quantized"}, r"compressed-tensors \(format pack-quantized\)"),
        (COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}}, "no floats of 8 bits"),
        (COMPRESSED | {"transform_config": {"R1": {}}}, "with transforms of the weights"),
    ],
)
def test_other_methods_are_named(tmp_path: Path, config: dict[str, Any], method: str) -> None:
    save(tmp_path)
    configure(tmp_path, quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=f"its weights are quantized by .*{method}"):
        capture(tmp_path)


def test_the_check_compares_with_the_products(tmp_path: Path) -> None:
    """transformers drops scales that the config does not name; what checks the lanes must not."""
    save_quantized(tmp_path, (-1, -1))
    lanes = kraken_compiler.transform(tmp_path, degree=2, form="standard")
    assert any(line.startswith("checked against the model at") for line in lanes.report.lines())
