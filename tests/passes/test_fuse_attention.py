from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from kraken_compiler.passes.normalize.drop_noops import DropNoops
from kraken_compiler.passes.normalize.fuse_attention import FuseAttention
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets

H, E = 2, 4
BEFORE: tuple[Pass[Program], ...] = (DropNoops(), CanonicalizeLayout())
Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """formula(q, k, v [B, H, S, E], keep [S, S])"""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, E)).transpose(1, 2) for y in (x, x.cos(), x.sin()))
        seq = x.shape[1]
        return self.formula(q, k, v, torch.ones(seq, seq, dtype=torch.bool).tril())


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(E)


def distance(keep: Tensor) -> Tensor:
    """ALiBi for two heads, [1, 2, S, S]."""
    place = torch.arange(keep.shape[0], dtype=torch.float64)
    return torch.tensor([0.5, 0.25], dtype=torch.float64)[None, :, None, None] * (place[None, :] - place[:, None])


def bloom(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Three-dimensional products over batch times heads, the bias added by baddbmm."""
    batch, heads, seq, width = q.shape
    q, k, v = (x.reshape(batch * heads, seq, width) for x in (q, k, v))
    alibi = distance(keep)[:, :, :1].expand(batch, heads, 1, seq).reshape(batch * heads, 1, seq)
    raw = alibi.baddbmm(q, k.transpose(1, 2), beta=0.5, alpha=1 / math.sqrt(width))
    masked = raw.view(batch, heads, seq, seq).masked_fill(~keep, -1e30)
    probabilities = torch.softmax(masked, dim=-1).view(batch * heads, seq, seq)
    return torch.bmm(probabilities, v).view(batch, heads, seq, width)


def capped(q: Tensor, k: Tensor) -> Tensor:
    """Scores that never exceed 2 (Gemma 2)."""
    return torch.tanh(scores(q, k) / 2.0) * 2.0


def with_sinks(raw: Tensor, v: Tensor, shift: bool = True) -> Tensor:
    """A column of sinks beside the scores, cut off behind the softmax (gpt-oss)."""
    sinks = torch.tensor([0.5, -1.0], dtype=raw.dtype)[None, :, None, None].expand(*raw.shape[:-1], 1)
    raw = torch.cat([raw, sinks], dim=-1)
    shares = torch.softmax(raw - raw.max(dim=-1, keepdim=True).values if shift else raw, dim=-1)
    return shares[..., :-1] @ v


ATTENTIONS: dict[str, Formula] = {
    "bidirectional": lambda q, k, v, keep: torch.softmax(scores(q, k), -1) @ v,
    "scaled before": lambda q, k, v, keep: torch.softmax((q * 0.3) @ k.mT, -1) @ v,
    "masked_fill": lambda q, k, v, keep: torch.softmax(scores(q, k).masked_fill(~keep, float("-inf")), -1) @ v,
    "where": lambda q, k, v, keep: torch.softmax(torch.where(keep, scores(q, k), -1e30), -1) @ v,
    "where tensor": lambda q, k, v, keep: (
        torch.softmax(torch.where(keep, scores(q, k), torch.full([], -1e30, dtype=q.dtype)), -1) @ v
    ),
    "additive mask": lambda q, k, v, keep: (
        torch.softmax(scores(q, k) + torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, float("-inf")), -1) @ v
    ),
    "bias, then mask": lambda q, k, v, keep: (
        torch.softmax((distance(keep) + scores(q, k)).masked_fill(~keep, float("-inf")), -1) @ v
    ),
    "mask, then bias, then scale": lambda q, k, v, keep: (
        torch.softmax((torch.where(keep, q @ k.mT, -1e30) + distance(keep)) * 0.5, -1) @ v
    ),
    "baddbmm": bloom,
    "one key head for all": lambda q, k, v, keep: (
        torch.softmax(scores(q, k[:, :1]).masked_fill(~keep, float("-inf")), -1) @ v[:, :1]
    ),
    "softmax in another dtype": lambda q, k, v, keep: (
        torch.softmax(scores(q, k), -1, dtype=torch.float64).to(q.dtype) @ v
    ),
}


CAPPED: dict[str, Formula] = {
    "capped": lambda q, k, v, keep: torch.softmax(capped(q, k).masked_fill(~keep, float("-inf")), -1) @ v,
    "sinks": lambda q, k, v, keep: with_sinks(scores(q, k).masked_fill(~keep, float("-inf")), v),
    "sinks, not shifted": lambda q, k, v, keep: with_sinks(scores(q, k), v, shift=False),
    "capped, with sinks": lambda q, k, v, keep: with_sinks(capped(q, k) + distance(keep), v),
}


def _read_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    probabilities = torch.softmax(scores(q, k), -1)
    return probabilities @ v + probabilities.sum(-1, keepdim=True)


OTHERS: dict[str, Formula] = {
    "softmax over queries": lambda q, k, v, keep: torch.softmax(scores(q, k), -2) @ v,
    "softmax over heads": lambda q, k, v, keep: torch.softmax(scores(q, k), 1) @ v,
    "probabilities read twice": _read_twice,
    "probabilities on the right": lambda q, k, v, keep: v.mT @ torch.softmax(scores(q, k), -1),
    "capped scores": lambda q, k, v, keep: torch.softmax(torch.tanh(scores(q, k)), -1) @ v,
    "masked, then capped": lambda q, k, v, keep: (
        torch.softmax(torch.tanh(scores(q, k).masked_fill(~keep, -9.0)) * 2.0, -1) @ v
    ),
    "a column cut off in front": lambda q, k, v, keep: (
        torch.softmax(torch.cat([scores(q, k), q[..., :1]], -1), -1)[..., 1:] @ v
    ),
    "a second column from the data": lambda q, k, v, keep: (
        torch.softmax(torch.cat([scores(q, k), q[..., :1]], -1), -1)[..., :-1] @ v
    ),
    "gated probabilities": lambda q, k, v, keep: (torch.softmax(scores(q, k), -1) * keep) @ v,
    "scores that are no product": lambda q, k, v, keep: torch.softmax(q.cos(), -1) @ k.mT,
    "scale of every key": lambda q, k, v, keep: torch.softmax(scores(q, k) * k.mean(-1).unsqueeze(-2), -1) @ v,
}


WHY = {
    "softmax over queries": "over another dim than the keys",
    "softmax over heads": "over another dim than the keys",
    "probabilities read twice": "probabilities are read by more than one product",
    "probabilities on the right": "probabilities are the right operand",
    "capped scores": "'aten.tanh.default' is between the softmax and a product",
    "masked, then capped": "scores are capped after they are masked",
    "a column cut off in front": "probabilities are cut",
    "a second column from the data": "the column beside the scores is no weight",
    "gated probabilities": "'aten.mul.Tensor' changes the probabilities",
    "scores that are no product": "'aten.cos.default' is between the softmax and a product",
    "scale of every key": "not the same for all keys",
}


def test_the_runner_tells_what_nearly_fired(caplog: pytest.LogCaptureFixture) -> None:
    program = captured(Attention(OTHERS["softmax over heads"]), hidden(H * E)).after(*BEFORE)
    with caplog.at_level("INFO"):
        PassRunner().run(program, [FuseAttention()])
    (line,) = (record.getMessage() for record in caplog.records if "nearly" in record.getMessage())
    assert line.startswith("  nearly 1 more, the first at node softmax of module '")
    assert line.endswith("a softmax before a product is over another dim than the keys")


@pytest.mark.parametrize("name", CAPPED)
def test_fuses_capped_scores_and_sinks(name: str) -> None:
    program = check_pass(FuseAttention(), captured(Attention(CAPPED[name]), hidden(H * E)), matches=1, before=BEFORE)
    (node,) = (node for node in program.graph.nodes if "capped_attention" in str(node.target))
    assert ("softcap" in node.kwargs, "sinks" in node.kwargs) == ("capped" in name, "sinks" in name)
    assert not {"aten.softmax.int", "aten.matmul"} & set(targets(program))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_fuses(name: str) -> None:
    sample = captured(Attention(ATTENTIONS[name]), hidden(H * E))
    program = check_pass(FuseAttention(), sample, matches=1, before=BEFORE)
    calls = targets(program)
    assert calls.count("aten.scaled_dot_product_attention") == 1
    assert not {"aten.softmax.int", "aten.matmul", "aten.bmm", "aten.baddbmm"} & set(calls)


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_others_alone(name: str) -> None:
    sample = captured(Attention(OTHERS[name]), hidden(H * E))
    check_untouched(FuseAttention(), sample, before=BEFORE, why=WHY[name])


def test_golden(golden: Golden) -> None:
    sample = captured(Attention(ATTENTIONS["masked_fill"]), hidden(H * E))
    golden("fuse_attention", check_pass(FuseAttention(), sample, matches=1, before=BEFORE))
