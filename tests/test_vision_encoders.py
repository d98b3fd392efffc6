"""Encoders of images: a stream that begins with pixels, LayerScale on the branches, a class token."""

from __future__ import annotations

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
from tests.zoo.builder import Builder

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "image_size": 16,
    "patch_size": 4,
}


def _model(auto: str, family: str, **config: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(family, **_SIZES, **config))
    assert isinstance(made, nn.Module)
    return made


MODELS = {
    "vit": Builder("vit", partial(_model, "AutoModelForImageClassification", "vit", intermediate_size=96)),
    "dinov2": Builder("dinov2", partial(_model, "AutoModelForImageClassification", "dinov2", mlp_ratio=2)),
}


def images(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_images_in_every_form(name: str) -> None:
    model = MODELS[name]()
    source = capture(model, example_inputs={"pixel_values": images(2, 0)})
    pixels = images(3, 1)
    with torch.no_grad():
        want = model(pixel_values=pixels).logits
        for degree in (2, 4):
            for form in FORMS:
                program, _ = lower(source.program, degree, form)
                assert program.cached is None
                assert "more than token ids" in program.no_cache
                lanes = LaneModule.from_program(program, source.store.read)
                error = errors(lanes(pixel_values=pixels).logits, want)[1]
                assert error < 1e-4 if form == "standard" else error > 1e-3, f"degree {degree}, {form}: {error}"
