"""Projections whose weights are computed in the graph, at degrees at which lanes of unequal width are padded.

Shape legend: B batch, S sequence, D stream width, L layers, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as weight_norm_by_hook

import kraken_compiler
from tests.reports.small_models import (
    COLUMNS,
    EXAMPLE,
    FFN,
    LM,
    TOLERANCE,
    Attention,
    D,
    relative_error,
)

pytestmark = pytest.mark.slow


class CastAttention(Attention):
    """Master weights in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.out.double()

    def project(self, y_BSD: Tensor) -> Tensor:
        return F.linear(y_BSD, self.out.weight.to(y_BSD.dtype), self.out.bias.to(y_BSD.dtype))


class CastLikeFFN(FFN):
    """Cast to the type of an activation, which says so by itself."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x_BSD))
        return F.linear(hidden, self.down.weight.double().type_as(hidden), self.down.bias.double().to(hidden))


class RoundedBiasAttention(Attention):
    """Lanes add a third of the bias each; a third of a whole number is none."""

    def project(self, y_BSD: Tensor) -> Tensor:
        return F.linear(y_BSD, self.out.weight, (8 * self.out.bias).to(torch.int32) / 8)


class WholeBiasAttention(Attention):
    """Integers with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(D) % 7)

    def project(self, y_BSD: Tensor) -> Tensor:
        assert isinstance(self.steps, Tensor)
        return F.linear(y_BSD, self.out.weight, self.steps * 0.125)


class ScaledAttention(Attention):
    def project(self, y_BSD: Tensor) -> Tensor:
        return F.linear(y_BSD, 0.5 * self.out.weight, self.out.bias)


class NormAttention(Attention):
    """`weight_norm` of every projection."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.qkv)
        parametrizations.weight_norm(self.out)


class NormFFN(FFN):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.up)
        parametrizations.weight_norm(self.down)


class HookedNormAttention(Attention):
    """The older `weight_norm`, a hook."""

    def __init__(self) -> None:
        super().__init__()
        weight_norm_by_hook(self.out)


class SpectralFFN(FFN):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.up)
        parametrizations.spectral_norm(self.down)


class NormalizedFFN(FFN):
    """Rows of length 1: a part of a row does not know how long the whole is."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x_BSD, F.normalize(self.up.weight))), F.normalize(self.down.weight, dim=-1))


class AdaptedAttention(Attention):
    """An adapter of low rank, merged as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a_RD, self.b_DR = nn.Parameter(torch.zeros(4, D)), nn.Parameter(torch.zeros(D, 4))

    def project(self, y_BSD: Tensor) -> Tensor:
        return F.linear(y_BSD, self.out.weight + 2.0 * self.b_DR @ self.a_RD, self.out.bias + self.b_DR.sum(-1))


class MaskedFFN(FFN):
    """A pruned layer that is taught further."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.arange(D * COLUMNS).reshape(D, COLUMNS) % 3 > 0
        self.register_buffer("mask", mask)

    def forward(self, x_BSD: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        return F.linear(F.gelu(self.up(x_BSD)), self.down.weight * self.mask, self.down.bias)


class TurnedFFN(FFN):
    """[in, out] as in `Conv1D`, seen through a view and computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.zeros(D * COLUMNS))
        nn.init.normal_(self.turned, std=0.2)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.gelu(self.up(x_BSD)) @ torch.tanh(self.turned.view(COLUMNS, D))


class ByHeadAttention(Attention):
    """An output weight [heads, head size, D] that is scaled head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.by_head = nn.Parameter(torch.zeros(self.heads, D // self.heads, D))
        self.gains = nn.Parameter(torch.rand(self.heads, 1, 1) + 0.5)

    def project(self, y_BSD: Tensor) -> Tensor:
        return y_BSD @ (self.by_head * self.gains).reshape(-1, D) + self.out.bias


class FoldedFFN(FFN):
    """A weight of two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.zeros(D, COLUMNS // 2)) for _ in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.linear(torch.sin(self.up(x_BSD)), torch.cat([self.left, self.right.exp()], dim=1), self.down.bias)


class ExpFFN(FFN):
    """An activation that is not 0 at 0, and a down-projection that is computed."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.linear(torch.cos(self.up(x_BSD)).exp(), self.down.weight.abs(), self.down.bias.sin())


class StackedLM(LM):
    """All layers' output projections in one tensor, and all layers' FFNs in another, of which views are taken."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        layers = len(self.attention)
        self.out_LDD = nn.Parameter(torch.stack([module.out.weight.detach() for module in self.attention]))
        self.down_LDF = nn.Parameter(torch.cat([module.down.weight.detach() for module in self.ffn]))
        self.layers = layers

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        outs = self.out_LDD.unbind() if self.spelling == "unbind" else list(self.out_LDD)
        downs = self.down_LDF.chunk(self.layers)
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            y_BSD = attention.attend(*attention.split(self.norms[2 * layer](x_BSD))).transpose(1, 2).flatten(2)
            out = outs[layer] if self.spelling == "unbind" else self.out_LDD[layer]
            x_BSD = x_BSD + F.linear(y_BSD, out.bfloat16().float() if self.spelling == "cast" else out)
            hidden = F.silu(ffn.up(self.norms[2 * layer + 1](x_BSD)))
            down = downs[layer] if self.spelling == "unbind" else self.down_LDF[layer * D : (layer + 1) * D]
            x_BSD = x_BSD + F.linear(hidden, down.tanh() if self.spelling == "computed" else down)
        return self.head(x_BSD)


ATTENTIONS = (
    CastAttention,
    RoundedBiasAttention,
    WholeBiasAttention,
    ScaledAttention,
    NormAttention,
    HookedNormAttention,
    AdaptedAttention,
    ByHeadAttention,
)
FFNS = (CastLikeFFN, NormFFN, SpectralFFN, NormalizedFFN, MaskedFFN, TurnedFFN, FoldedFFN, ExpFFN)


def error(model: nn.Module, degree: int) -> float:
    lanes = kraken_compiler.transform(model, degree=degree, form="standard", example_inputs=EXAMPLE)
    return max(relative_error(lanes, model, 2, 9), relative_error(lanes, model, 1, 17))


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_projections_of_attention(attention: Callable[[], Attention], degree: int) -> None:
    """Four heads on three lanes: one, one and two of them."""
    assert error(LM(attention), degree) < TOLERANCE


@pytest.mark.parametrize("ffn", FFNS)
def test_projections_of_ffns(ffn: Callable[[], FFN]) -> None:
    """96 columns on five lanes: 19 or 20 of them."""
    assert error(LM(lambda: Attention(heads=8), ffn), 5) < TOLERANCE


@pytest.mark.parametrize("spelling", ["index", "unbind", "cast", "computed"])
def test_weights_of_several_layers_in_one_tensor(spelling: str) -> None:
    assert error(StackedLM(spelling), 3) < TOLERANCE
