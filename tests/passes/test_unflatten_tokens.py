from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.unflatten_tokens import UnflattenTokens
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets

BEFORE = [CanonicalizeLayout()]


class Flattened(nn.Module):
    """x [B, S, 4] -> function on [B*S, 4] -> back to [B, S, 4]"""

    def __init__(self, function: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.up, self.down, self.norm = function, nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        return self.function(self, flat, x).view(x.shape[0], x.shape[1], 4)


PER_TOKEN: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "ffn": lambda m, flat, x: m.down(F.relu(m.up(flat))),
    "norm and residual": lambda m, flat, x: flat + m.norm(flat),
    "two flattened tensors": lambda m, flat, x: flat * x.cos().reshape(-1, 4),
    "weight per column": lambda m, flat, x: flat * m.norm.weight + 1,
    "gathered columns": lambda m, flat, x: flat.gather(-1, flat.topk(4, -1)[1]),
    "columns taken along": lambda m, flat, x: flat.take_along_dim(flat.topk(4, -1)[1], 1),
    "scattered columns": lambda m, flat, x: (0 * flat).scatter(1, flat.topk(4, -1)[1], flat),
    "one number scattered": lambda m, flat, x: flat.scatter(1, flat.topk(2, -1)[1], 0.5),
}
ACROSS_TOKENS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "running sum": lambda m, flat, x: flat.cumsum(0),
    "gathered tokens": lambda m, flat, x: flat.gather(0, (flat > 0).long()),
    "taken of all numbers": lambda m, flat, x: flat.take_along_dim((flat > 0).long()),
    "product of tokens": lambda m, flat, x: (flat @ flat.t()) @ flat,
    "softmax over tokens": lambda m, flat, x: torch.softmax(flat, 0),
    "positions in the flat order": lambda m, flat, x: flat * torch.arange(flat.shape[0])[:, None],
    "batch and sequence exchanged": lambda m, flat, x: flat + x.transpose(0, 1).reshape(-1, 4),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_undoes_flattening_around_what_is_per_token(name: str) -> None:
    program = check_pass(UnflattenTokens(), captured(Flattened(PER_TOKEN[name]), hidden(4)), matches=1, before=BEFORE)
    assert "aten.reshape" not in targets(program)


@pytest.mark.parametrize("name", ACROSS_TOKENS)
def test_leaves_what_mixes_tokens_alone(name: str) -> None:
    check_untouched(UnflattenTokens(), captured(Flattened(ACROSS_TOKENS[name]), hidden(4)), before=BEFORE)


def test_leaves_other_reshapes_alone() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], -1).cos().view(x.shape[0], x.shape[1], 4)

    check_untouched(UnflattenTokens(), captured(Heads(), hidden(4)), before=BEFORE)


def test_golden(golden: Golden) -> None:
    program = check_pass(UnflattenTokens(), captured(Flattened(PER_TOKEN["ffn"]), hidden(4)), matches=1, before=BEFORE)
    golden("unflatten_tokens", program)
