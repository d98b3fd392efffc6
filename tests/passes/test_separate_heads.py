from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.drop_noops import DropNoops
from kraken_compiler.passes.normalize.hoist_sizes import HoistSizes
from kraken_compiler.passes.normalize.separate_heads import SeparateHeads
from tests.passes.helpers import captured, check_pass, check_untouched, hidden, targets

D = 8
BEFORE: tuple[Pass, ...] = (DropNoops(), CanonicalizeLayout(), HoistSizes())


def test_heads_leave_the_batch() -> None:
    """One match for each of q, k and v, one for the tokens in front of the output projection."""
    module = nn.MultiheadAttention(D, 2, batch_first=False)

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    program = check_pass(SeparateHeads(), captured(Mixing(), hidden(D)), matches=4, before=BEFORE)
    assert all(len(node.meta["val"].shape) != 2 for node in program.graph.nodes if "linear" in node.name)
    assert "aten.scaled_dot_product_attention" in targets(program)


class Merged(nn.Module):
    """Two of three dims change places, and only then are the heads split off the batch: another order of the heads."""

    def forward(self, x: Tensor) -> Tensor:
        seq, batch, _ = x.shape
        y = x.reshape(seq, 2 * batch, D // 2).permute(1, 0, 2)
        return F.relu(y).reshape(2, batch, seq, D // 2)


def test_another_order_of_batch_and_heads_stays() -> None:
    check_untouched(SeparateHeads(), captured(Merged(), hidden(D)), before=BEFORE)


class OtherTokens(nn.Module):
    """The linear's result is given a batch and sequence other than its operand's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        y = self.out(x.reshape(batch, seq, 2, D // 2).reshape(batch * seq, D))
        return y.reshape(seq, batch, D)


def test_a_reshape_that_moves_tokens_stays() -> None:
    check_untouched(SeparateHeads(), captured(OtherTokens(), hidden(D)), before=(DropNoops(), HoistSizes()))
