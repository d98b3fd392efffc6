from __future__ import annotations

import torch
from torch import Tensor, nn

from kraken_compiler.passes.normalize.inline_regions import InlineRegions
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets


class NoGrad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.cos()
        return x * scale


class Rotary(nn.Module):
    """What Hugging Face's rotary embeddings do: an autocast region inside a no_grad region."""

    def __init__(self, factor: float = 2.0, enabled: bool = False) -> None:
        super().__init__()
        self.factor, self.enabled = factor, enabled

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        with torch.autocast("cpu", enabled=self.enabled):
            y = y + self.factor * x
        return y.exp()


class Several(nn.Module):
    """Regions of both levels one after the other: sub-graphs of different levels may have the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.rotaries = nn.ModuleList(Rotary(factor) for factor in (0.3, 0.5, 0.7))

    def forward(self, x: Tensor) -> Tensor:
        for rotary in self.rotaries:
            with torch.autocast("cpu", enabled=False):
                y = x.tanh() * rotary.factor
            x = x - rotary(x * y)
        return x


def test_inlines_a_no_grad_region(golden: Golden) -> None:
    program = check_pass(InlineRegions(), captured(NoGrad(), hidden(4)), matches=1)
    assert targets(program) == ["aten.cos", "aten.mul.Tensor"]
    golden("inline_regions", program)


def test_inlines_nested_regions() -> None:
    program = check_pass(InlineRegions(), captured(Rotary(), hidden(4)), matches=2)
    assert targets(program) == ["aten.sin", "aten.mul.Tensor", "aten.add.Tensor", "aten.exp"]


def test_regions_with_equal_names_do_not_mix() -> None:
    check_pass(InlineRegions(), captured(Several(), hidden(4)), matches=9)


def test_rejects_autocast_that_casts() -> None:
    rejection = captured(Rotary(enabled=True), hidden(4, dtype=torch.float32), dtype=torch.float32).rejection(
        InlineRegions()
    )
    assert "torch.autocast" in rejection.reason
    assert rejection.nodes
    assert "without autocast" in rejection.hint


def test_names_other_operators_of_higher_order_as_what_they_are() -> None:
    """Only some of them branch or loop: transformers' masks export as `flat_apply`, a call of a function."""
    start = captured(NoGrad(), hidden(4))
    (product,) = (node for node in start.program.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    for operator, reason in (("flat_apply", "operator of higher order ('flat_apply')"), ("cond", "branches or loops")):
        product.target = getattr(torch.ops.higher_order, operator)
        rejection = start.rejection(InlineRegions())
        assert reason in rejection.reason
        assert rejection.hint


def test_leaves_a_plain_graph_alone() -> None:
    check_untouched(InlineRegions(), captured(nn.Linear(4, 4), hidden(4)))
