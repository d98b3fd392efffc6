"""Directories with more, fewer or other weight files and tensors than the model needs: what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError
from tests.reports.model_directories import (
    assert_as_loaded,
    assert_reads,
    command,
    configure,
    make,
    save,
    tensors_of,
    write_index,
    write_tensors,
)

pytestmark = pytest.mark.slow

Q = "model.layers.0.self_attn.q_proj"


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of another save: other values under the same names."""
    return {name: value + 1 for name, value in tensors.items()}


def halves(tensors: dict[str, Tensor], of: int = 2) -> dict[str, dict[str, Tensor]]:
    """The tensors in two shards."""
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    return {
        f"model-{number:05}-of-{of:05}.safetensors": {name: tensors[name] for name in part}
        for number, part in enumerate(parts, 1)
    }


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    tensors = tensors_of(save(tmp_path))
    write_index(tmp_path, halves(other(tensors)))
    notes = assert_as_loaded(tmp_path)
    assert len(notes) == 1
    assert notes[0].startswith("not read: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, ")
    assert "model.safetensors comes first, as in transformers" in notes[0]


def test_an_index_of_files_that_are_gone_beside_a_single_file(tmp_path: Path) -> None:
    tensors = tensors_of(save(tmp_path))
    shards = halves(other(tensors))
    write_index(tmp_path, shards)
    for name in shards:
        (tmp_path / name).unlink()
    assert_reads(tmp_path)


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    tensors = tensors_of(save(tmp_path))
    torch.save(other(tensors), tmp_path / "pytorch_model.bin")
    assert ["pytorch_model.bin" in note for note in assert_reads(tmp_path)] == [True]
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, halves(tensors))
    assert ["pytorch_model.bin" in note for note in assert_reads(tmp_path)] == [True]


def test_an_index_goes_before_shards_that_it_does_not_name(tmp_path: Path) -> None:
    tensors = tensors_of(save(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, halves(tensors))
    for name, part in halves(other(tensors), of=3).items():
        write_tensors(tmp_path, part, name)
    write_tensors(tmp_path, other(tensors), "consolidated.safetensors")
    notes = assert_reads(tmp_path)
    assert len(notes) == 1
    assert notes[0].startswith("not read: consolidated.safetensors, model-00001-of-00003.safetensors")


@pytest.mark.parametrize(
    "name",
    ["model.fp16.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors", "weights.safetensors"],
)
def test_files_under_names_that_transformers_does_not_read(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputFileError, match=rf"no weight files that transformers reads .*, only {name}: rename it"):
        capture(tmp_path)


def test_shards_of_two_saves(tmp_path: Path) -> None:
    """One tensor in two files: read if the values agree, else nobody knows which."""
    tensors = tensors_of(save(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (name, first), (_, second) = halves(tensors).items()
    mixed = {"model-00002-of-00003.safetensors": tensors, name: first}
    write_index(tmp_path, mixed)
    assert any("shards of 2 saves (of 00002 and 00003 files)" in note for note in assert_reads(tmp_path))
    write_index(tmp_path, mixed | {name: other(first)})
    with pytest.raises(
        InputFileError, match=r"is in two files with different values, .*00001-of-00002.*00002-of-00003"
    ):
        capture(tmp_path)
    write_index(tmp_path, {name: first, "model-00002-of-00003.safetensors": {**second, "extra": torch.ones(2)}})
    assert any(
        "1 tensor of the files is not part of the model and not read: extra" in n for n in assert_reads(tmp_path)
    )


def test_an_index_that_places_tensors_wrongly(tmp_path: Path) -> None:
    """The files count, not what the index says is in them."""
    tensors = tensors_of(save(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, halves(tensors))
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(tensors, names[0]) | {"lm_head.weight": names[1]}
    path.write_text(json.dumps(index))
    assert any("names other files than those that hold" in note for note in assert_reads(tmp_path))


def test_an_index_of_files_in_a_folder(tmp_path: Path) -> None:
    """Beside a file of the same name that it does not mean; links out of the directory are how models are kept."""
    directory, kept = tmp_path / "model", tmp_path / "kept"
    tensors = tensors_of(save(directory))
    (directory / "model.safetensors").rename(kept)
    name = "model-00001-of-00001.safetensors"
    write_tensors(directory, other(tensors), name)
    (directory / "parts").mkdir()
    (directory / "parts" / name).symlink_to(kept)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, f"parts/{name}")}))
    assert assert_reads(directory) == [f"not read: {name}; {path.name} comes first, as in transformers"]
    for outside in ("../kept", str(kept)):
        path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, outside)}))
        with pytest.raises(InputFileError, match="which is outside of the directory"):
            capture(directory)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_that_a_wrapper_left_behind(tmp_path: Path, prefix: str) -> None:
    tensors = tensors_of(save(tmp_path))
    write_tensors(tmp_path, {prefix + name: value for name, value in tensors.items()})
    with pytest.raises(InputFileError, match=rf"is missing from .*; instead they hold {prefix}model\.embed_tokens"):
        capture(tmp_path)


def test_a_file_that_the_config_names(tmp_path: Path) -> None:
    tensors = tensors_of(save(tmp_path))
    write_tensors(tmp_path, other(tensors), "chosen.safetensors")
    configure(tmp_path, transformers_weights="chosen.safetensors")
    notes = assert_reads(tmp_path)
    assert notes == ["not read: model.safetensors; chosen.safetensors comes first, as in transformers"]
    for name in ("../chosen.safetensors", "none.safetensors", "chosen.bin"):
        configure(tmp_path, transformers_weights=name)
        with pytest.raises(InputFileError, match="transformers_weights"):
            capture(tmp_path)


def test_a_header_that_names_a_tensor_twice(tmp_path: Path) -> None:
    path = save(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    again = f', "model.norm.weight": {json.dumps(header["lm_head.weight"])}'
    text = (json.dumps(header)[:-1] + again + "}").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(InputFileError, match=r"its header has 'model\.norm\.weight' twice"):
        capture(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        f"{Q}.weight_scale",
        f"{Q}.weight_scale_inv",
        f"{Q}.input_scale",
        f"{Q}.lora_A.weight",
        f"{Q}.lora_B.default.weight",
        f"base_model.model.{Q}.lora_A.weight",
        f"{Q}.scales",
        f"{Q}.g_idx",
        f"{Q}.bias",
        "model.embed_tokens.weight_zero_point",
        "lm_head.SCB",
    ],
)
def test_a_tensor_that_belongs_to_a_weight(tmp_path: Path, extra: str) -> None:
    tensors = tensors_of(save(tmp_path))
    write_tensors(tmp_path, tensors | {extra: torch.ones(4)})
    for require_weights in (True, False):
        with pytest.raises(InputFileError, match=rf"tensor '{extra}' belongs to '.*\.weight', and nothing .* reads it"):
            capture(tmp_path, require_weights=require_weights)


def test_tensors_of_no_part_of_the_model_are_told(tmp_path: Path) -> None:
    """A layer too many, another head, scales of a quantised cache."""
    tensors = tensors_of(save(tmp_path))
    more = {name.replace(".0.", ".1."): value for name, value in tensors.items() if ".layers.0." in name}
    more |= {"score.weight": torch.ones(2, 32), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    write_tensors(tmp_path, tensors | more)
    notes = assert_as_loaded(tmp_path)
    assert notes == [
        f"{len(more)} tensors of the files are not part of the model and not read: model.layers.0.self_attn.k_scale, "
        f"model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight and {len(more) - 3} more"
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_buffers_of_old_releases_go_by(tmp_path: Path, kind: str) -> None:
    tensors = tensors_of(save(tmp_path, kind))
    old: dict[str, list[str]] = {
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
        "gpt2": ["h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
        "gpt_neox": ["gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
    }
    write_tensors(tmp_path, tensors | {name: torch.ones(1) for name in old[kind]})
    notes = assert_reads(tmp_path)
    assert [note for note in notes if "inv_freq" in note] == []


def test_what_stands_there_instead_of_a_missing_tensor(tmp_path: Path) -> None:
    """Weights of a quantisation method that the config does not name."""
    tensors = tensors_of(save(tmp_path))
    del tensors[f"{Q}.weight"]
    parts = {f"{Q}.{part}": torch.ones(4, dtype=torch.int32) for part in ("qweight", "qzeros", "scales")}
    write_tensors(tmp_path, tensors | parts)
    with pytest.raises(InputFileError, match=rf"'{Q}\.weight' .* is missing from .*; instead they hold {Q}\.qweight, "):
        capture(tmp_path)


@pytest.mark.parametrize("change", ["an expert less", "a piece less", "a piece twice"])
def test_experts_that_do_not_add_up(tmp_path: Path, change: str) -> None:
    tensors = tensors_of(save(tmp_path, "mixtral", num_local_experts=2, num_experts_per_tok=1))
    experts = "model.layers.0.block_sparse_moe.experts.1"
    if change == "a piece twice":
        write_tensors(tmp_path, tensors | {f"{experts.removeprefix('model.')}.w2.weight": torch.ones(32, 48)})
    else:
        gone = ("w1", "w2", "w3") if change == "an expert less" else ("w1",)
        write_tensors(tmp_path, {k: v for k, v in tensors.items() if k not in [f"{experts}.{w}.weight" for w in gone]})
    store = capture(tmp_path).store
    with pytest.raises(InputFileError, match=r"tensor '.*experts\..*' (cannot be put together|has shape)"):
        list(map(store.read, store.names()))


def test_router_biases_stay_in_float32(tmp_path: Path) -> None:
    """Loading in bfloat16 leaves them alone; building a model in bfloat16 does not."""
    sizes: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
    sizes |= {"num_key_value_heads": 4, "head_dim": 8, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0}
    model = make("glm4_moe", **sizes)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    with torch.no_grad():
        model.state_dict()[name].copy_(torch.tensor([0.1, 0.2, 0.30001, 0.4]))
    model.save_pretrained(tmp_path)
    configure(tmp_path, dtype="bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    captured = capture(tmp_path)
    held = captured.store.read(name)
    assert held.dtype == loaded.state_dict()[name].dtype == torch.float32
    torch.testing.assert_close(held, loaded.state_dict()[name], rtol=0, atol=0)


def test_the_command_says_so_and_refuses_so(tmp_path: Path) -> None:
    """`--plan` reads no weights, but the files' headers."""
    tensors = tensors_of(save(tmp_path))
    plan = (tmp_path, "--plan", "--degree", "2")
    write_tensors(tmp_path, tensors | {"score.weight": torch.ones(2, 32)})
    code, output = command(*plan)
    assert code == 0, output
    told = [line for line in output.splitlines() if line.startswith("note ")]
    assert told == ["note      1 tensor of the files is not part of the model and not read: score.weight"]
    write_tensors(tmp_path, tensors | {f"{Q}.weight_scale": torch.ones(1)})
    code, output = command(*plan)
    assert code == 5
    assert f"'{Q}.weight_scale' belongs to" in output
    assert len(output.splitlines()) == 1
