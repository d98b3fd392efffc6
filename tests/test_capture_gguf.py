"""Capture of GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kraken_compiler.capture import capture
from kraken_compiler.errors import InputFileError, UnsupportedModelError, UsageError

WIDTH, FFN, VOCAB, HEADS, KV_HEADS = 32, 48, 40, 4, 2


def write(path: Path, architecture: str = "llama") -> Path:
    """A one-layer model with random weights and no tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCAB)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCAB, WIDTH),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (kv, WIDTH),
        "blk.0.attn_v.weight": (kv, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (FFN, WIDTH),
        "blk.0.ffn_up.weight": (FFN, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, FFN),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values(tmp_path: Path) -> None:
    captured = capture(write(tmp_path / "model.bin"))
    assert captured.origin.kind == "gguf"
    assert captured.origin.model_class.endswith("LlamaForCausalLM")
    assert captured.origin.tokenizer is None
    assert captured.notes == ("model.bin holds no tokenizer: give token ids, not text (--input-ids)",)
    assert captured.program.inputs[0].shape == ("batch", "sequence")
    assert captured.store.read("model.layers.0.mlp.up_proj.weight").shape == (FFN, WIDTH)
    assert len(captured.origin.sha256) == 64
    half = capture(tmp_path / "model.bin", dtype=torch.bfloat16)
    assert half.store.read("lm_head.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [10, 300, 6000])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputFileError, match=r"model\.gguf is truncated, damaged or no model") as caught:
        capture(path)
    assert "\n" not in str(caught.value)


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformers cannot read .*model\.gguf.*rwkv"):
        capture(write(tmp_path / "model.gguf", "rwkv6"))


@pytest.mark.parametrize("package", ["gguf", "transformers"])
def test_missing_packages_are_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"reading the GGUF file {path} needs .*pip install 'kraken-compiler\[hf\]'"):
        capture(path)
