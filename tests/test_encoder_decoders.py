"""Encoder-decoders: two streams, cross-attention that reads the encoder's result, T5's relative positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.backends.single.lane_module import LaneModule
from kraken_compiler.capture import capture
from kraken_compiler.ir.forms import FORMS
from kraken_compiler.lowering import lower
from kraken_compiler.verify.compare import errors
from tests.zoo import random_tokens
from tests.zoo.builder import Builder

LAYERS = 2
_T5: dict[str, Any] = {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": LAYERS, "num_heads": 8}
_BART: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
_WHISPER: dict[str, Any] = {
    **_BART,
    "num_mel_bins": 16,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "pad_token_id": 0,
}


def _model(auto: str, family: str, **config: Any) -> nn.Module:
    import transformers

    ids = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False, "vocab_size": 97}
    settings = transformers.AutoConfig.for_model(family, **{**ids, **config})
    made = getattr(transformers, auto).from_config(settings)
    assert isinstance(made, nn.Module)
    return made


def _tokens(batch: int, seed: int) -> dict[str, Tensor]:
    """Source and target of different lengths."""
    return {
        "input_ids": random_tokens(97, batch, 11, seed),
        "decoder_input_ids": random_tokens(97, batch, 7, seed + 1),
    }


def _sound(batch: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(batch, 16, 24, generator=generator),
        "decoder_input_ids": random_tokens(97, batch, 7, seed),
    }


Inputs = Callable[[int, int], dict[str, Tensor]]
MODELS: dict[str, tuple[Builder, Inputs]] = {
    name: (Builder(name, make), inputs)
    for name, make, inputs in (
        ("t5", partial(_model, "AutoModelForSeq2SeqLM", "t5", **_T5), _tokens),
        ("t5_gated", partial(_model, "AutoModelForSeq2SeqLM", "t5", **_T5, feed_forward_proj="gated-gelu"), _tokens),
        ("bart", partial(_model, "AutoModelForSeq2SeqLM", "bart", **_BART, max_position_embeddings=32), _tokens),
        ("whisper", partial(_model, "AutoModelForSpeechSeq2Seq", "whisper", **_WHISPER), _sound),
    )
}


@pytest.mark.parametrize("name", MODELS)
def test_every_form(name: str) -> None:
    build, inputs = MODELS[name]
    model = build()
    source = capture(model, example_inputs=inputs(2, 0))
    given = inputs(3, 5)
    with torch.no_grad():
        want = model(**given).logits
        for degree in (2, 4):
            for form in FORMS:
                program, _ = lower(source.program, degree, form)
                assert program.layers is not None
                assert program.layers.encoder is not None
                kinds = [branch.kind[0] for branch in program.layers.branches]
                assert "".join(kinds) == "af" * LAYERS + "aaf" * LAYERS
                assert len(program.layers.layers) == 2 * LAYERS
                assert program.cached is None
                lanes = LaneModule.from_program(program, source.store.read)
                error = errors(lanes(**given).logits, want)[1]
                assert error < 1e-4 if form == "standard" else error > 1e-3, f"degree {degree}, {form}: {error}"
