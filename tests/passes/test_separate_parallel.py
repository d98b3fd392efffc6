from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.canonicalize_linear import CanonicalizeLinear
from kraken_compiler.passes.normalize.drop_noops import DropNoops
from kraken_compiler.passes.normalize.separate_parallel import SeparateParallel
from tests.passes.helpers import captured, check_pass, check_untouched, hidden, targets

BEFORE = [DropNoops(), CanonicalizeLayout(), CanonicalizeLinear()]


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Beside(nn.Module):
    """A residual sum of what three FFNs beside each other give."""

    def __init__(self, joined: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.joined, self.ffns = joined, nn.ModuleList(Ffn() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        return self.joined(x, [ffn(x) for ffn in self.ffns])


@pytest.mark.parametrize(
    ("joined", "matches", "factors"),
    [
        (lambda x, ffns: x + 0.2 * (ffns[0] + ffns[1]), 1, 2),
        (lambda x, ffns: x + (-(ffns[0] + ffns[1]).reshape(-1, 4) / 4).view(x.shape), 1, 0),
        (lambda x, ffns: x + 0.2 * (ffns[0] + ffns[1] + ffns[2]), 2, 3),
        (lambda x, ffns: x + 0.2 * (3 * (ffns[0] + ffns[1]) + ffns[2]), 3, 5),
        (lambda x, ffns: x + x.sigmoid() * (ffns[0] + ffns[1] * x.sigmoid()), 1, 3),
    ],
)
def test_factors_of_a_sum_of_projections_become_its_terms(
    joined: Callable[[Tensor, list[Tensor]], Tensor], matches: int, factors: int
) -> None:
    sample = captured(Beside(joined), hidden(4))
    program = check_pass(SeparateParallel(), sample, matches=matches, before=BEFORE)
    assert targets(program).count("aten.mul.Tensor") == factors
    assert targets(program)[-2:] == ["aten.add.Tensor"] * 2


@pytest.mark.parametrize(
    "joined",
    [
        lambda x, ffns: x + ffns[0] + ffns[1],
        lambda x, ffns: x + (ffns[0] + ffns[1]).sigmoid(),
        lambda x, ffns: 0.2 * (ffns[0] + ffns[1]),
        lambda x, ffns: x + 0.2 * (x + ffns[1]),
        lambda x, ffns: x + 0.2 * (ffns[0] + ffns[1].sigmoid()),
        lambda x, ffns: x + 1 / (ffns[0] + ffns[1]),
    ],
    ids=["no factor", "not distributive", "no sum behind it", "the stream's", "no projection", "a divisor"],
)
def test_leaves_other_sums_alone(joined: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    check_untouched(SeparateParallel(), captured(Beside(joined), hidden(4)), before=BEFORE)
