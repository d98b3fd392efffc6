from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.canonicalize_linear import CanonicalizeLinear, weight_derived
from tests.passes.helpers import Golden, captured, check_idempotent, check_pass, check_untouched, hidden, targets


class Product(nn.Module):
    """function(x [B, S, 4], weight [4, 6], bias [6])"""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], bias: tuple[int, ...] = (6,)) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.empty(4, 6)), nn.Parameter(torch.empty(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


LINEARS: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "matmul": (1, lambda x, w, b: x @ w),
    "matmul plus bias": (2, lambda x, w, b: x @ w + b),
    "bias plus matmul": (2, lambda x, w, b: b + x @ w),
    "mm": (1, lambda x, w, b: torch.mm(x.flatten(0, 1), w)),
    "addmm": (1, lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w)),
    "addmm that adds nothing else": (1, lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, beta=1, alpha=1)),
    "linear plus bias": (1, lambda x, w, b: F.linear(x, w.t()) + b),
    "scaled weight": (2, lambda x, w, b: x @ (2 * w) + b.exp()),
}
OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "product of activations": lambda x, w, b: x @ x.transpose(1, 2),
    "weight on the left": lambda x, w, b: w.t() @ x.transpose(1, 2),
    "weighted addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, alpha=2.0),
    "activation added": lambda x, w, b: F.linear(x, w.t()) + x.sum(),
    "bias added twice over": lambda x, w, b: torch.add(F.linear(x, w.t()), b, alpha=2),
    "bias of another shape": lambda x, w, b: F.linear(x, w.t()) + b.unsqueeze(0),
    "second bias": lambda x, w, b: F.linear(x, w.t(), b) + b,
}


@pytest.mark.parametrize("name", LINEARS)
def test_writes_products_with_weights_as_linear(name: str) -> None:
    matches, function = LINEARS[name]
    program = check_pass(CanonicalizeLinear(), captured(Product(function), hidden(4)), matches=matches)
    calls = targets(program)
    assert calls.count("aten.linear") == 1
    assert not {"aten.matmul", "aten.mm", "aten.addmm", "aten.add.Tensor"} & set(calls)


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_other_products_alone(name: str) -> None:
    check_untouched(CanonicalizeLinear(), captured(Product(OTHERS[name]), hidden(4)))


def test_keeps_a_bias_that_only_one_reader_adds() -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight.t())
        return (y + bias) * y

    check_untouched(CanonicalizeLinear(), captured(Product(function), hidden(4)))


def test_keeps_an_addmm_whose_bias_is_a_matrix() -> None:
    """A linear takes only one bias per column."""
    sample = captured(Product(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), bias=(1, 6)), hidden(4))
    check_untouched(CanonicalizeLinear(), sample)


def test_what_is_made_of_weights_counts_as_weight() -> None:
    sample = captured(Product(lambda x, w, b: x @ (2 * w) + x.shape[1] * b), hidden(4))
    names = {node.name for node in weight_derived(sample.program)}
    assert {"p_weight", "p_bias", "mul"} <= names
    assert "x" not in names
    assert "matmul" not in names


def test_golden(golden: Golden) -> None:
    program = check_pass(CanonicalizeLinear(), captured(Product(lambda x, w, b: x @ w + b), hidden(4)), matches=2)
    check_idempotent(CanonicalizeLayout(), program)
    golden("canonicalize_linear", program)
