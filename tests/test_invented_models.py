"""Plausible Transformers that cannot be divided among lanes: each is refused, and the operator that mixes is named.

They are nobody's: the compiler cannot know them by name, and what gives them away is not always a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.capture import capture
from kraken_compiler.errors import UnsupportedModelError
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from tests.table_notes import note
from tests.zoo import Builder, logits_of, random_tokens
from tests.zoo.plain import D, Decoder, E, GptBlock, H

pytestmark = pytest.mark.slow


class ReplaceableBlock(GptBlock):
    """The GPT block with parts of it to replace."""

    def compete(self, y_BHSE: Tensor) -> Tensor:
        """What becomes of the heads before the output projection."""
        return y_BHSE

    def activate(self, hidden_BSF: Tensor) -> Tensor:
        """The FFN's activation."""
        return F.gelu(hidden_BSF)

    def add(self, x_BSD: Tensor, branch_BSD: Tensor) -> Tensor:
        """How a branch enters the stream."""
        return x_BSD + branch_BSD

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.norm1(x_BSD)
        q, k, v = (proj(y_BSD).unflatten(-1, (H, E)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y_BHSE = self.compete(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x_BSD = self.add(x_BSD, self.o(y_BHSE.transpose(1, 2).flatten(2)))
        return self.add(x_BSD, self.ffn[2](self.activate(self.ffn[0](self.norm2(x_BSD)))))


class CompetingHeads(ReplaceableBlock):
    """Heads compete for every token: a softmax over the heads weighs what they found."""

    def compete(self, y_BHSE: Tensor) -> Tensor:
        return y_BHSE * torch.softmax(y_BHSE.mean(-1, keepdim=True), dim=1)


class LoudestHead(ReplaceableBlock):
    """Only the head with the largest first element speaks; no gradient tells that heads were compared."""

    def compete(self, y_BHSE: Tensor) -> Tensor:
        loudness = y_BHSE[..., :1]
        return y_BHSE * (loudness >= loudness.amax(dim=1, keepdim=True))


class SoftmaxFfn(ReplaceableBlock):
    """The FFN is a memory that is looked up: its activation is a softmax over all columns."""

    def activate(self, hidden_BSF: Tensor) -> Tensor:
        return torch.softmax(hidden_BSF, dim=-1)


class FewWinners(ReplaceableBlock):
    """The FFN lets only its 12 largest columns through."""

    def activate(self, hidden_BSF: Tensor) -> Tensor:
        least = hidden_BSF.topk(12, dim=-1).values[..., -1:]
        return torch.where(hidden_BSF >= least, hidden_BSF, 0.0)


class LoudnessGuard(ReplaceableBlock):
    """The FFN is halved for tokens that are far too loud, which on random numbers none is."""

    def activate(self, hidden_BSF: Tensor) -> Tensor:
        loud = hidden_BSF.abs().amax(-1, keepdim=True) > 1e4
        return F.gelu(hidden_BSF) * torch.where(loud, 0.5, 1.0)


class GatedStream(ReplaceableBlock):
    """Every branch also says, token by token, how much of the old stream stays."""

    def add(self, x_BSD: Tensor, branch_BSD: Tensor) -> Tensor:
        return x_BSD * torch.sigmoid(branch_BSD.mean(-1, keepdim=True)) + branch_BSD


class SharedScale(ReplaceableBlock):
    """Columns are rounded to 16 levels of the loudest of them, as fake quantisation of activations does."""

    def activate(self, hidden_BSF: Tensor) -> Tensor:
        step = hidden_BSF.abs().amax(-1, keepdim=True) / 16
        return F.relu((hidden_BSF / step).round() * step)


@dataclass(frozen=True)
class Invented:
    """A model and what its refusal says.

    Attributes:
        block: Its second layer; the others are plain.
        operator: What the named node's name begins with.
        reason: A part of the reason.
    """

    block: Callable[[], nn.Module]
    operator: str
    reason: str


MODELS = (
    Invented(CompetingHeads, "softmax", "mixes the heads"),
    Invented(LoudestHead, "amax", "mixes the heads"),
    Invented(SoftmaxFfn, "softmax", "mixes the columns"),
    Invented(FewWinners, "topk", "mixes the columns"),
    Invented(LoudnessGuard, "amax", "mixes the columns"),
    Invented(SharedScale, "amax", "mixes the columns"),
    Invented(GatedStream, "add", "the residual stream is rewritten"),
)


def model_of(block: Callable[[], nn.Module]) -> nn.Module:
    """Three layers, the second one made by `block`."""
    layers = [GptBlock(), block(), GptBlock()]
    return Builder("invented", lambda: Decoder(layers, nn.LayerNorm(D), 97, positions=True, tied=False))()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.block.__name__)
def test_is_refused_and_the_operator_is_named(model: Invented) -> None:
    captured = capture(model_of(model.block), example_inputs={"input_ids": random_tokens(97, 2, 16)})
    for degree in (2, 3):
        with pytest.raises(UnsupportedModelError) as caught:
            lower(captured.program, degree, "standard")
        (first, *_), message = caught.value.rejections, str(caught.value)
        assert model.reason in first.reason
        assert first.path.startswith("blocks.1"), message
        assert first.nodes[0].startswith(model.operator), message
        assert f"module '{first.path}' (node {first.nodes[0]}" in message
        assert first.hint
    note("invented", model.block.__name__, reason=first.reason, what=inspect.cleandoc(model.block.__doc__ or ""))


def test_what_the_models_replace_is_all_that_is_wrong() -> None:
    model = model_of(ReplaceableBlock)
    captured = capture(model, example_inputs={"input_ids": random_tokens(97, 2, 16)})
    ids = random_tokens(97, 3, 13)
    lanes = LaneModule.from_program(lower(captured.program, 3, "standard")[0], captured.store.read)
    torch.testing.assert_close(logits_of(lanes, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)
