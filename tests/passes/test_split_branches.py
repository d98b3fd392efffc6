from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import Recognized
from kraken_compiler.passes.pipelines import RECOGNIZE
from kraken_compiler.passes.shard.degrees import even_degrees, smallest_degree, valid_degrees
from kraken_compiler.passes.shard.plan_shards import PlanShards
from kraken_compiler.passes.shard.split_branches import SplitBranches
from tests.passes.helpers import (
    Golden,
    Sample,
    assert_close,
    captured,
    check_idempotent,
    check_untouched,
    gpt,
    recognized,
    targets,
)
from tests.passes.models import Attention, D, E, FusedQkv, GainAttention, GatedFfn, Gpt, H


def branch_values(sample: Sample, program: Recognized, lane: int) -> list[Tensor]:
    """What every branch adds to the stream, on one lane."""
    wanted = {branch.output for branch in program.layers.branches}
    values: list[Tensor] = []

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if node.name in wanted:
                values.append(value)
            return value

    read = program.reader(sample.read)
    weights = [spec.take(read(spec.source), lane) for spec in program.weights.values()]
    with torch.no_grad():
        Record(program.module).run(*weights, *sample.inputs[1])
    return values


@pytest.mark.parametrize(
    "model",
    [
        Gpt(),
        Gpt(attention=lambda: Attention(2)),
        Gpt(attention=lambda: FusedQkv("contiguous", 2), ffn=lambda: GatedFfn("chunk")),
        Gpt(attention=GainAttention, ffn=lambda: GatedFfn("interleaved")),
    ],
    ids=["separate", "grouped", "fused", "gains"],
)
def test_the_lanes_parts_add_up(model: Gpt) -> None:
    """The first branch still reads the whole stream, so its parts must sum to the source model's branch."""
    sample, program = recognized(model)
    want = branch_values(sample, program, 0)[0]
    program = sample.after(*RECOGNIZE, PlanShards(4), SplitBranches(4))
    parts = [branch_values(sample, program, lane)[0] for lane in range(4)]
    torch.testing.assert_close(sum(parts), want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(parts[0], parts[1])
    check_idempotent(SplitBranches(4), program)


class NativeGroups(Attention):
    """Groups of queries inside the attention operator."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class EagerMultiQuery(Attention):
    """One key head that broadcasts over all queries, softmax by hand."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 2
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


class GatedAttention(Attention):
    """A third projection gates the heads' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, H * E)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSE = self.mix(*self.project(x_BSD)).transpose(1, 2).flatten(2)
        return self.o(y_BSE * torch.sigmoid(self.gate(x_BSD)))


class RelativeBias(Attention):
    """A learned bias per head and distance, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, H)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        bias_SSH = self.table((place[:, None] - place[None, :]).clamp(-15, 15) + 16)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_SSH.permute(2, 0, 1)[None])


@pytest.mark.parametrize(
    "attention",
    [partial(NativeGroups, 2), partial(NativeGroups, 1), partial(EagerMultiQuery, 1), GatedAttention, RelativeBias],
)
def test_attentions_of_all_kinds_split_exactly(attention: Callable[[], Attention]) -> None:
    """Four lanes, so the KV heads of the first three are replicated."""
    sample = captured(Gpt(attention=attention))
    assert_close(sample.run(sample.lanes(4, STANDARD)), sample.expected())


def test_one_lane_changes_nothing() -> None:
    program = gpt().after(*RECOGNIZE, PlanShards(1))
    before = targets(program)
    check_idempotent(SplitBranches(1), program)
    assert targets(program) == before
    assert not any(spec.shards for spec in program.weights.values())


def test_a_wrong_plan_is_noticed() -> None:
    """Every structure is checked on numbers: a plan that mixes up two lanes' columns does not pass."""
    program = gpt().after(*RECOGNIZE, PlanShards(2))
    attention, *rest = program.shards
    program.shards = (replace(attention, columns=attention.columns[::-1]), *rest)
    (rejection,) = SplitBranches(2).run(program).rejections
    assert "lane 0's part of the branch differs" in rejection.reason
    assert rejection.path == "blocks.0.attention.o"


def test_valid_degrees() -> None:
    _, program = recognized(Gpt(attention=lambda: Attention(2)))
    assert valid_degrees(program.layers) == (1, 2, 3, 4)
    assert even_degrees(program.layers) == (1, 2, 4)
    assert smallest_degree(program.layers) == 2


def test_golden(golden: Golden) -> None:
    sample, _ = recognized(Gpt(attention=lambda: FusedQkv("contiguous", 2)))
    program = sample.after(*RECOGNIZE, PlanShards(2), SplitBranches(2))
    check_untouched(SplitBranches(2), replace(sample, program=program))
    golden("split_branches", program)
