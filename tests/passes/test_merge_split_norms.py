from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.passes.normalize.merge_split_norms import MergeSplitNorms
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets

H, E = 3, 4

Norms = Callable[[], list[nn.Module]]


class SplitNorms(nn.Module):
    """x [B, S, 12] -> [B, 3, S, 4], one norm a head."""

    def __init__(self, norms: list[nn.Module], order: tuple[int, ...] = (0, 1, 2), size: int = 1) -> None:
        super().__init__()
        self.norms, self.order, self.size = nn.ModuleList(norms), order, size

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (H, E)).transpose(1, 2).split(self.size, dim=1)
        return torch.cat([self.norms[place](heads[head]) for place, head in enumerate(self.order)], dim=1)


ALIKE: dict[str, Norms] = {
    "layer norms": lambda: [nn.LayerNorm(E) for _ in range(H)],
    "layer norms without bias": lambda: [nn.LayerNorm(E, bias=False) for _ in range(H)],
    "layer norms without weights": lambda: [nn.LayerNorm(E, elementwise_affine=False) for _ in range(H)],
    "rms norms": lambda: [nn.RMSNorm(E, eps=1e-3) for _ in range(H)],
}
DIFFERENT: dict[str, Norms] = {
    "kinds": lambda: [nn.LayerNorm(E), nn.RMSNorm(E), nn.LayerNorm(E)],
    "layer norm epsilons": lambda: [nn.LayerNorm(E, eps=eps) for eps in (1e-3, 1e-3, 1e-1)],
    "rms norm epsilons": lambda: [nn.RMSNorm(E, eps=eps) for eps in (1e-3, 1e-3, 1e-1)],
    "weights": lambda: [nn.LayerNorm(E), nn.LayerNorm(E), nn.LayerNorm(E, elementwise_affine=False)],
    "biases": lambda: [nn.LayerNorm(E), nn.LayerNorm(E), nn.LayerNorm(E, bias=False)],
}


@pytest.mark.parametrize("name", ALIKE)
def test_merges_norms_of_single_heads(name: str) -> None:
    program = check_pass(MergeSplitNorms(), captured(SplitNorms(ALIKE[name]()), hidden(H * E)), matches=1)
    calls = targets(program)
    assert "aten.cat" not in calls
    assert sum("norm" in call for call in calls) == 1


@pytest.mark.parametrize("name", DIFFERENT)
def test_leaves_norms_that_differ_alone(name: str) -> None:
    sample = captured(SplitNorms(DIFFERENT[name]()), hidden(H * E))
    check_untouched(MergeSplitNorms(), sample, why="differ in more than their weights")


@pytest.mark.parametrize(
    ("order", "size", "why"),
    [
        ((0, 2, 1), 1, "in another order"),
        ((0, 0, 1), 1, "in another order"),
        ((0, 1), 1, "not those of all heads"),
        ((0, 1), 2, "not those of all heads"),
    ],
)
def test_leaves_heads_out_of_order_alone(order: tuple[int, ...], size: int, why: str) -> None:
    sample = captured(SplitNorms(ALIKE["layer norms"](), order, size), hidden(H * E))
    check_untouched(MergeSplitNorms(), sample, why=why)


def test_golden(golden: Golden) -> None:
    program = check_pass(MergeSplitNorms(), captured(SplitNorms(ALIKE["layer norms"]()), hidden(H * E)), matches=1)
    golden("merge_split_norms", program)
