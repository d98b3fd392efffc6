from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.passes.normalize.lower_einsum import LowerEinsum
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets

D, H, E = 6, 2, 3


class Einsum(nn.Module):
    """One einsum of an activation [B, S, 6] and a weight, or of two activations [B, S, 2, 3]."""

    def __init__(self, equation: str, *shape: int, weight_first: bool = False) -> None:
        super().__init__()
        self.equation, self.weight_first = equation, weight_first
        self.weight = nn.Parameter(torch.empty(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return torch.einsum(self.equation, (self.weight, x) if self.weight_first else (x, self.weight))
        y = x.unflatten(-1, (H, E))
        return torch.einsum(self.equation, y, y.cos())


class Attended(Einsum):
    """Contracts two dims of a weight at once, as an output projection does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x.unflatten(-1, (H, E)), self.weight)


LINEARS: dict[str, nn.Module] = {
    "to heads": Einsum("bsd,dhe->bhse", D, H, E),
    "weight with heads in front": Einsum("bsd,hed->bshe", H, E, D),
    "plain": Einsum("bsd,fd->bsf", 5, D),
    "weight first": Einsum("df,bsd->bsf", D, 5, weight_first=True),
    "spaces": Einsum("b s d, d f -> b s f", D, 5),
    "from heads": Attended("bshe,hed->bsd", H, E, D),
    "from heads, turned": Attended("bshe,deh->bsd", D, E, H),
}
MATMULS: dict[str, nn.Module] = {
    "scores": Einsum("bqhe,bkhe->bhqk"),
    "scores, turned": Einsum("bqhe,bkhe->bhkq"),
}
OTHERS: dict[str, nn.Module] = {
    "weight by position": Einsum("bsd,d->bsd", D),
    "a dim that is summed away": Einsum("bsd,df->bf", D, 5),
    "two contracted dims of activations": Einsum("bqhe,bkhe->bqk"),
    "no contraction": Einsum("bqhe,bkhe->bqkhe"),
    "ellipsis": Einsum("...d,df->...f", D, 5),
}


@pytest.mark.parametrize("name", LINEARS)
def test_writes_products_with_weights_as_linear(name: str) -> None:
    program = check_pass(LowerEinsum(), captured(LINEARS[name], hidden(D)), matches=1)
    assert targets(program).count("aten.linear") == 1


@pytest.mark.parametrize("name", MATMULS)
def test_writes_products_of_activations_as_matmul(name: str) -> None:
    program = check_pass(LowerEinsum(), captured(MATMULS[name], hidden(D)), matches=1)
    assert targets(program).count("aten.matmul") == 1


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_others_alone(name: str) -> None:
    check_untouched(LowerEinsum(), captured(OTHERS[name], hidden(D)))


def test_leaves_three_operands_alone() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.einsum("bsd,btd,bud->bstu", [x, x, x])

    check_untouched(LowerEinsum(), captured(Three(), hidden(D)))


def test_golden(golden: Golden) -> None:
    golden("lower_einsum", check_pass(LowerEinsum(), captured(LINEARS["to heads"], hidden(D)), matches=1))
