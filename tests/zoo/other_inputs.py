"""Tiny random models that take more, or something else, than one batch of token ids: images, sound, two texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.builder import Builder, random_tokens

Inputs = Callable[[int, int], dict[str, Tensor]]
"""Seeded inputs of a model, by argument: takes the batch size and a seed."""

_IMAGES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "image_size": 16,
    "patch_size": 4,
}
_T5: dict[str, Any] = {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 8}
_BART: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
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


@dataclass(frozen=True)
class OtherInputs:
    """A model and what it takes.

    Attributes:
        build: Makes it.
        inputs: Makes its inputs.
        branches: The branches of its layers, `a`ttention and `f`fn, an encoder's first.
    """

    build: Builder
    inputs: Inputs
    branches: str

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether some layers read another stream, too."""
        return "aaf" in self.branches


def _images(batch: int, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def _sound(batch: int, seed: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 16, 24, generator=torch.Generator().manual_seed(seed))
    return {"input_features": features, "decoder_input_ids": random_tokens(97, batch, 7, seed)}


def _texts(batch: int, seed: int) -> dict[str, Tensor]:
    """Source and target, of different lengths."""
    return {
        "input_ids": random_tokens(97, batch, 11, seed),
        "decoder_input_ids": random_tokens(97, batch, 7, seed + 1),
    }


def _from_config(auto: str, family: str, **config: Any) -> nn.Module:
    import transformers

    settings = transformers.AutoConfig.for_model(family, architectures=[], **config)
    made = getattr(transformers, auto).from_config(settings)
    assert isinstance(made, nn.Module)
    return made


def _images_model(name: str, **config: Any) -> OtherInputs:
    make = partial(_from_config, "AutoModelForImageClassification", name, **_IMAGES, **config)
    return OtherInputs(Builder(name, make), _images, "af" * 3)


def _encoder_decoder(
    name: str, family: str, inputs: Inputs = _texts, *, auto: str = "AutoModelForSeq2SeqLM", **config: Any
) -> OtherInputs:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False, "vocab_size": 97}
    make = partial(_from_config, auto, family, **{**ids, **config})
    return OtherInputs(Builder(name, make), inputs, "af" * 2 + "aaf" * 2)


_MODELS = (
    _images_model("vit", intermediate_size=96),
    _images_model("deit", intermediate_size=96),
    _images_model("dinov2", mlp_ratio=2),
    _encoder_decoder("t5", "t5", **_T5),
    _encoder_decoder("t5_gated", "t5", **_T5, feed_forward_proj="gated-gelu"),
    _encoder_decoder("bart", "bart", **_BART, max_position_embeddings=32),
    _encoder_decoder("whisper", "whisper", _sound, auto="AutoModelForSpeechSeq2Seq", **_WHISPER),
)

OTHER_INPUTS: dict[str, OtherInputs] = {model.build.name: model for model in _MODELS}
"""Models whose inputs are not one batch of token ids."""
