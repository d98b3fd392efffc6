from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.fuse_experts import FuseExperts
from kraken_compiler.passes.normalize.unflatten_tokens import UnflattenTokens
from tests.passes.helpers import captured, check_pass, check_untouched, hidden, targets

BEFORE = [CanonicalizeLayout()]
Product = Callable[["Experts", Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """x [B, S, 4], every token through two of three experts; function(rows [N, 4], experts [N]) -> [N, 6]"""

    def __init__(self, function: Product) -> None:
        super().__init__()
        self.function, self.router = function, nn.Linear(4, 3)
        self.out_in, self.in_out = nn.Parameter(torch.empty(3, 6, 4)), nn.Parameter(torch.empty(3, 4, 6))
        self.bias = nn.Parameter(torch.empty(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        share, picked = torch.softmax(self.router(flat), dim=-1).topk(2, dim=-1)
        rows = self.function(self, flat.repeat_interleave(2, dim=0), picked.reshape(-1))
        rows = rows * share.reshape(-1).unsqueeze(-1)
        return rows.view(flat.shape[0], 2, 6).sum(dim=1).view(x.shape[0], x.shape[1], 6)


def columns(m: Experts, rows: Tensor, picked: Tensor) -> Tensor:
    return torch.bmm(m.out_in[picked], rows.unsqueeze(-1)).squeeze(-1)


FUSED: dict[str, tuple[int, Product]] = {
    "weight times column": (1, columns),
    "row times weight": (1, lambda m, rows, picked: torch.bmm(rows.unsqueeze(1), m.in_out[picked]).squeeze(1)),
    "matmul": (1, lambda m, rows, picked: (m.out_in[picked] @ rows.unsqueeze(2)).squeeze(2)),
    "index_select": (
        1,
        lambda m, rows, picked: (m.out_in.index_select(0, picked) @ rows.unsqueeze(-1)).squeeze(-1),
    ),
    "bias": (2, lambda m, rows, picked: columns(m, rows, picked) + m.bias[picked]),
    "bias in front": (2, lambda m, rows, picked: m.bias[picked] + columns(m, rows, picked)),
}
LEFT: dict[str, Product] = {
    "the weight of every row's own": lambda m, rows, picked: torch.bmm(
        torch.stack([rows] * 6, 1), rows.unsqueeze(-1)
    ).squeeze(-1),
    "rows of several vectors": lambda m, rows, picked: torch.bmm(m.out_in[picked], torch.stack([rows, rows], -1))[
        ..., 0
    ],
}


@pytest.mark.parametrize("name", FUSED)
def test_reads_products_with_picked_weights(name: str) -> None:
    matches, function = FUSED[name]
    program = check_pass(FuseExperts(), captured(Experts(function), hidden(4)), matches=matches, before=BEFORE)
    assert targets(program).count("kraken.expert_linear") == 1
    assert not {"aten.bmm", "aten.matmul", "aten.index.Tensor", "aten.index_select"} & set(targets(program))


@pytest.mark.parametrize("name", LEFT)
def test_leaves_other_products_alone(name: str) -> None:
    check_untouched(FuseExperts(), captured(Experts(LEFT[name]), hidden(4)), before=BEFORE)


def test_a_column_that_is_no_row_is_nearly_one() -> None:
    def stacked(m: Experts, rows: Tensor, picked: Tensor) -> Tensor:
        return torch.bmm(m.out_in[picked], torch.stack([rows], dim=-1)).squeeze(-1)

    check_untouched(FuseExperts(), captured(Experts(stacked), hidden(4)), before=BEFORE, why="no row made a column")


def test_a_bias_of_other_experts_stays_outside() -> None:
    sample = captured(Experts(lambda m, rows, picked: columns(m, rows, picked) + m.bias[2 - picked]), hidden(4))
    program = check_pass(FuseExperts(), sample, matches=1, before=BEFORE)
    assert "aten.add.Tensor" in targets(program)


def test_tokens_and_their_experts_are_unflattened() -> None:
    function = FUSED["bias"][1]
    program = check_pass(
        UnflattenTokens(), captured(Experts(function), hidden(4)), matches=1, before=[*BEFORE, FuseExperts()]
    )
    (experts,) = [node for node in program.graph.nodes if node.target is torch.ops.kraken.expert_linear.default]
    assert [str(size) for size in experts.meta["val"].shape[-2:]] == ["2", "6"]
    assert experts.meta["val"].dim() == 4
    assert "aten.reshape" not in targets(program)
