"""Norms after branches and on the stream, in every form, against models unrolled by hand.

A lane's view of the stream repeats the norms on what the lane has: whole sums up to the point that its peers'
contributions have reached it, and from there on its own parts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.capture import capture
from kraken_compiler.ir.forms import FORMS, Form, Lag
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from tests.zoo import NORMS, logits_of, token_batch
from tests.zoo.norms import PostNormBlock, SandwichNormBlock
from tests.zoo.plain import FFN, D, H

pytestmark = pytest.mark.slow

LAZY = Form("lazy", Lag(2, 5), Lag(3, 3), "made up for this test: own contributions late, too")
EVERY_FORM = (*FORMS.values(), LAZY)
LANES = 2


class Branch:
    """A branch as the unrolled model runs it: what a lane computes, and how a sum of that joins the stream."""

    def __init__(self, block: PostNormBlock | SandwichNormBlock, kind: str) -> None:
        self.block, self.kind = block, kind
        self.is_first = kind == "attention"

    def part(self, read_BSD: Tensor, lane: int) -> Tensor:
        block = self.block
        if isinstance(block, SandwichNormBlock):
            read_BSD = (block.norm1 if self.is_first else block.norm2)(read_BSD)
        return self._attend(read_BSD, lane) if self.is_first else self._ffn(read_BSD, lane)

    def joined(self, stream_BSD: Tensor, sum_BSD: Tensor) -> Tensor:
        block = self.block
        if isinstance(block, SandwichNormBlock):
            return stream_BSD + (block.after1 if self.is_first else block.after2)(sum_BSD)
        return (block.norm1 if self.is_first else block.norm2)(stream_BSD + sum_BSD)

    def _attend(self, read_BSD: Tensor, lane: int) -> Tensor:
        mine, block = slice(lane * D // LANES, (lane + 1) * D // LANES), self.block
        q, k, v = (
            F.linear(read_BSD, proj.weight[mine], proj.bias[mine]).unflatten(-1, (H // LANES, -1)).transpose(1, 2)
            for proj in (block.q, block.k, block.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(mixed, block.o.weight[:, mine], block.o.bias / LANES)

    def _ffn(self, read_BSD: Tensor, lane: int) -> Tensor:
        mine, (up, act, down, _) = slice(lane * FFN // LANES, (lane + 1) * FFN // LANES), self.block.ffn
        hidden = act(F.linear(read_BSD, up.weight[mine], up.bias[mine]))
        return F.linear(hidden, down.weight[:, mine], down.bias / LANES)


def unrolled(model: nn.Module, forms: Sequence[Form], ids: Tensor) -> Tensor:
    """The logits of a model whose layers have these forms."""
    embedding = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
    branches = [Branch(block, kind) for block in model.blocks for kind in ("attention", "ffn")]
    parts: list[list[Tensor]] = []

    def whole(point: int) -> Tensor:
        stream = embedding
        for branch, of_lanes in zip(branches[:point], parts):
            stream = branch.joined(stream, torch.stack(of_lanes).sum(0))
        return stream

    def view(lane: int, own: int, peers: int) -> Tensor:
        stream = whole(peers)
        for number in range(peers, own):
            stream = branches[number].joined(stream, parts[number][lane])
        return stream

    for number, branch in enumerate(branches):
        lag = forms[number // 2].lag(branch.kind)
        own, peers = max(0, number + 1 - lag.own), max(0, number + 1 - lag.peers)
        parts.append([branch.part(view(lane, own, peers), lane) for lane in range(LANES)])
    return model.head(model.norm(whole(len(branches))))


def lowered(name: str) -> tuple[nn.Module, Callable[[Form | tuple[Form, ...]], tuple[Program, LaneModule]]]:
    model = NORMS[name]()
    source = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})

    def make(form: Form | tuple[Form, ...]) -> tuple[Program, LaneModule]:
        program, _ = lower(source.program, LANES, form, cached=False)
        return program, LaneModule.from_program(program, source.store.read)

    return model, make


@pytest.mark.parametrize("name", ["plain_post_norm", "plain_sandwich_norm"])
def test_forms_are_what_the_unrolled_model_computes(name: str) -> None:
    model, make = lowered(name)
    ids = token_batch(model, 3, 13)
    mixed = (FORMS["kraken"], FORMS["standard"], FORMS["ladder"])
    for form in (*EVERY_FORM, mixed):
        _, lanes = make(form)
        with torch.no_grad():
            want = unrolled(model, [form] * 3 if isinstance(form, Form) else form, ids)
        torch.testing.assert_close(logits_of(lanes, ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain_post_norm", "plain_sandwich_norm"])
def test_norms_add_no_reduce_and_take_no_window(name: str) -> None:
    """What kraken sends in one reduce, two sums side by side, is what standard sends in two. All sum the embedding."""
    _, make = lowered(name)
    plans = {}
    for form in FORMS:
        program, _ = make(FORMS[form])
        plans[form] = program.plan.reduces
        assert all(window.gemms for window in program.windows if window.promised)
    counts = {form: len(reduces) for form, reduces in plans.items()}
    assert counts == {
        "standard": 1 + 6,
        "kraken": 1 + 3,
        "ladder": 1 + 5,
        "delayed": 1 + 5,
        "sync-drop": 1 + 3,
        "parallel": 1 + 3,
    }
    assert {sum(reduce.bytes_per_token for reduce in reduces) for reduces in plans.values()} == {(1 + 6) * D * 4}
