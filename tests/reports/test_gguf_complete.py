"""GGUF files that lack or hold what the loader does not read: nothing is made up, nothing passed over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError
from tests.reports.model_directories import command, error

pytestmark = pytest.mark.slow

WIDTH, FFN, VOCABULARY, HEADS = 32, 48, 64, 4
TOP = ("token_embd.weight", "output_norm.weight", "output.weight")


def shapes(layers: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    found: dict[str, tuple[int, ...]] = dict(zip(TOP, ((VOCABULARY, WIDTH), (WIDTH,), (VOCABULARY, WIDTH))))
    for layer in range(layers):
        blocks = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        blocks |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,))
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in (blocks | norms).items()}
    return found


def write(
    path: Path,
    tensors: dict[str, Any],
    *,
    architecture: str = "llama",
    layers: int = 1,
    fields: dict[str, Any] | None = None,
    tokens: bool = False,
) -> Path:
    """A file of these tensors, given as arrays or as shapes."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCABULARY)
    if tokens:
        writer.add_tokenizer_model("llama")
        names = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(VOCABULARY - 3))]
        writer.add_token_list(names)
        writer.add_token_scores([0.0] * VOCABULARY)
        writer.add_token_types([1] * VOCABULARY)
    for key, value in (fields or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for name, value in tensors.items():
        array = value if isinstance(value, np.ndarray) else rng.normal(0, 0.2, value).astype(np.float32)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("number", [0, 1])
def test_a_piece_of_a_split_file(tmp_path: Path, number: int) -> None:
    everything = shapes(2)
    names = sorted(everything)
    part = names[: len(names) // 2] if number == 0 else names[len(names) // 2 :]
    fields = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
    path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
    write(path, {name: everything[name] for name in part}, layers=2, fields=fields)
    with pytest.raises(InputFileError, match=rf"is piece {number + 1} of 2 of a split GGUF file.*join the pieces"):
        capture(path)
    write(tmp_path / "whole.gguf", everything, layers=2, fields={"split.no": 0, "split.count": 1})
    assert capture(tmp_path / "whole.gguf").program.weights


@pytest.mark.parametrize(
    "missing", [("blk.1.ffn_up.weight",), ("output_norm.weight", "blk.0.attn_k.weight"), ("token_embd.weight",)]
)
def test_a_file_that_lacks_tensors(tmp_path: Path, missing: tuple[str, ...]) -> None:
    tensors = {name: shape for name, shape in shapes(2).items() if name not in missing}
    path = write(tmp_path / "m-00001-of-00003.gguf", tensors, layers=2)
    message = rf"is incomplete: {len(missing)} tensors of the model are not in it .*by its name it is one of 3 pieces"
    for require_weights in (True, False):
        with pytest.raises(InputFileError, match=message):
            capture(path, require_weights=require_weights)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_a_head_that_is_the_embedding(tmp_path: Path, architecture: str) -> None:
    tensors = {name: shape for name, shape in shapes().items() if name != "output.weight"}
    if architecture == "qwen2":
        tensors |= {f"blk.0.attn_{part}.bias": (WIDTH,) for part in "qkv"}
    if architecture == "gemma2":
        tensors |= {f"blk.0.{name}.weight": (WIDTH,) for name in ("post_attention_norm", "post_ffw_norm")}
    fields = {f"{architecture}.attention.key_length": 8} if architecture == "gemma2" else {}
    path = write(tmp_path / "model.gguf", tensors, architecture=architecture, fields=fields)
    lanes = kraken_compiler.transform(path, degree=2, form="standard")
    assert error(lanes, loaded(path)) < 1e-5


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rope_freqs.weight", (4,)),
        ("rope_factors_long.weight", (4,)),
        ("blk.0.attn_q.bias", (WIDTH,)),
        ("blk.0.attn_q_norm.weight", (8,)),
        ("blk.0.post_attention_norm.weight", (WIDTH,)),
        ("output_norm.bias", (WIDTH,)),
    ],
)
def test_tensors_without_which_the_model_is_another(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "model.gguf", shapes() | {name: shape})
    with pytest.raises(InputFileError, match=rf"transformers does not read the tensor '{name}', without which"):
        capture(path)


def test_tensors_of_no_part_of_the_model_are_told(tmp_path: Path) -> None:
    ones = np.ones(4, dtype=np.float32)
    path = write(
        tmp_path / "model.gguf", shapes(2) | {"v.patch_embd.weight": (3, 3), "rope_freqs.weight": ones}, tokens=True
    )
    lanes = kraken_compiler.transform(path, degree=2, form="standard")
    assert error(lanes, loaded(path)) < 1e-5
    lines = lanes.report.lines()
    assert any(
        line.startswith("note      ") and "blk.1.attn_k.weight, blk.1.attn_norm.weight" in line for line in lines
    )


@pytest.mark.parametrize(
    ("fields", "scaled"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn, by 4"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "linear, by 2"),
        ({"llama.rope.scale_linear": 8.0}, "linear, by 8"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, None),
    ],
)
def test_a_scaled_rotary_embedding(tmp_path: Path, fields: dict[str, Any], scaled: str | None) -> None:
    path = write(tmp_path / "model.gguf", shapes(), fields=fields)
    if scaled is None:
        assert capture(path).program.weights
        return
    with pytest.raises(
        InputFileError, match=rf"its rotary embedding is scaled \({scaled}\), which transformers does not"
    ):
        capture(path)


@pytest.mark.parametrize(
    ("architecture", "fields", "told"),
    [
        ("llama", {"llama.attention.scale": 0.7}, r"attention\.scale \(0\.7\) is not read"),
        ("llama", {"llama.attention.scale": 0.5}, r"attention\.scale \(0\.5\) is not read"),
        ("llama", {"llama.logit_scale": 5.5}, r"logit_scale \(5\.5\) is not read"),
        ("gemma2", {"gemma2.attn_logit_softcapping": 7.0}, r"attn_logit_softcapping \(7\) is not read"),
        ("gemma2", {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}, None),
        ("stablelm", {"stablelm.rope.dimension_count": 4}, r"rotates 4 dims of each head, and transformers, .* 2: use"),
        ("stablelm", {"stablelm.rope.dimension_count": 2}, None),
        ("llama", {"llama.attention.key_length": 16}, r"has shape \[.*\], and by the fields .* should have \["),
    ],
)
def test_fields_that_change_what_is_computed(
    tmp_path: Path, architecture: str, fields: dict[str, Any], told: str | None
) -> None:
    tensors = shapes()
    if architecture == "gemma2":
        del tensors["output.weight"]
        tensors |= {f"blk.0.{name}.weight": (WIDTH,) for name in ("post_attention_norm", "post_ffw_norm")}
        fields = fields | {"gemma2.attention.key_length": 8}
    if architecture == "stablelm":
        tensors |= {f"{name}.bias": (WIDTH,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    if "llama.attention.key_length" in fields:
        tensors["blk.0.ffn_up.weight"] = (FFN + 2, WIDTH)
    path = write(tmp_path / "model.gguf", tensors, architecture=architecture, fields=fields)
    if told is None:
        assert capture(path).program.weights
        return
    with pytest.raises(InputFileError, match=told) as caught:
        capture(path)
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", shapes())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputFileError, match=r"an adapter lies beside .*model\.gguf: merge it"):
        capture(path)


def test_a_file_without_a_tokenizer_compiles(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", shapes())
    code, output = command(path, "--degree", "2", "--form", "standard", "-o", tmp_path / "out")
    assert code == 0, output
    assert "note      model.gguf holds no tokenizer: give token ids, not text (--input-ids)" in output
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    write(path, shapes(), tokens=True)
    source = capture(path).origin.tokenizer
    assert source is not None
    assert source.gguf_file == "model.gguf"
