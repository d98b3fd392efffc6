from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.ir.cache import PICKS
from kraken_compiler.ir.forms import FORMS, KRAKEN
from kraken_compiler.ir.printer import program_text
from kraken_compiler.ir.program import LaneProgram, Program
from kraken_compiler.passes.cache.cache_attention import CacheAttention
from kraken_compiler.passes.shapes import same_size, shape_of
from kraken_compiler.passes.stages import with_cache
from tests.lane_decoder import LaneDecoder
from tests.passes.helpers import Golden, Sample, assert_close, captured, check_idempotent, gpt
from tests.passes.models import Attention, D, Ffn, Gpt


def lowered(sample: Sample) -> LaneProgram:
    return with_cache(sample.lanes(2, KRAKEN))


class Masked(Attention):
    """Attention whose mask a test chooses, as a function of query and key positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]), persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])[:, None]
        j = torch.arange(q.shape[2])[None, :]
        causal = j <= i
        mask = {
            "causal": causal,
            "window": causal & (i - j < 3),
            "chunks": causal & (i // 4 == j // 4),
            "prefix": causal | (j < 3),
            "anti-causal": i <= j,
            "both ways": (i - j).abs() < 100,
            "alibi": torch.where(causal, self.slopes[:, None, None] * (j - i), -torch.inf)[None],
            "curved": torch.where(causal, -((i - j) ** 2) * 0.1, -torch.inf),
        }[self.kind]
        if mask.is_floating_point():
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class LookingBack(Ffn):
    """An FFN that also sees the token before, as a shift or a convolution would."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return super().forward(x_BSD + F.pad(x_BSD, (0, 0, 1, 0))[:, :-1])


def decoded(sample: Sample, program: Program) -> None:
    """Prompt, then token by token, equals the whole run."""
    (ids,) = sample.inputs[0]
    (want,) = program_outputs(sample, program, ids)
    lanes = LaneDecoder(program, sample.read, len(ids), ids.shape[1])
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    parts = [lanes.run(ids[:, :4], places[:, :4])]
    parts += [lanes.run(ids[:, at : at + 1], places[:, at : at + 1]) for at in range(4, ids.shape[1])]
    assert_close([torch.cat(parts, 1)], [want])


def program_outputs(sample: Sample, program: Program, ids: Tensor) -> list[Tensor]:
    return Sample(sample.module, program, sample.read, ((ids,),)).run(program)


def test_fires_and_keeps_the_numbers() -> None:
    sample = gpt(2)
    program = lowered(sample)
    assert program.cached is not None
    assert [cache.heads for cache in program.cached.plan.caches] == [2, 2], "two of four heads on each lane"
    decoded(sample, program)
    text = program_text(program.cached.step)
    check_idempotent(CacheAttention(), program)
    assert program_text(program.cached.step) == text


@pytest.mark.parametrize(("kind", "window"), [("causal", 0), ("window", 3), ("alibi", 0)])
def test_masks_are_known_by_their_numbers(kind: str, window: int) -> None:
    sample = captured(Gpt(attention=partial(Masked, kind)))
    program = lowered(sample)
    assert program.cached is not None, program.no_cache
    (node,) = (n for n in program.cached.step.graph.nodes if n.target is torch.ops.kraken.cached_attention.default)
    assert node.args[9] == window
    assert (node.args[8] is not None) == (kind == "alibi")
    decoded(sample, program)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("chunks", "not causal with at most a sliding window and ALiBi slopes"),
        ("curved", "not causal with at most a sliding window and ALiBi slopes"),
        ("prefix", "its attention is not causal"),
        ("anti-causal", "its attention is not causal"),
        ("both ways", "its attention is not causal"),
    ],
)
def test_other_masks_get_no_cache(kind: str, reason: str) -> None:
    program = lowered(captured(Gpt(attention=partial(Masked, kind))))
    assert program.cached is None
    assert reason in program.no_cache


def test_attention_both_ways_gets_no_cache() -> None:
    class BothWays(Attention):
        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    program = lowered(captured(Gpt(attention=BothWays)))
    assert program.cached is None
    assert "its attention is not causal" in program.no_cache


def test_tokens_that_meet_outside_attention_get_no_cache() -> None:
    program = lowered(captured(Gpt(ffn=LookingBack)))
    assert program.cached is None
    assert "sequence" in program.no_cache or "mix tokens" in program.no_cache


class Positioned(Gpt):
    """Learned positions; the first two rows of their table are never used, as in OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(14, D)

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device) + 2)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


def test_learned_positions_bound_the_capacity() -> None:
    sample = captured(Positioned())
    program = lowered(sample)
    assert program.cached is not None
    assert program.cached.plan.limit == 12
    decoded(sample, program)


@pytest.mark.parametrize(
    ("form", "reduces"), [("standard", [0, 0, 0, 0, 0, 1, 1]), ("kraken", [0, 0, 1, 1]), ("ladder", [0, 0, 0, 0, 1, 1])]
)
def test_the_end_of_the_last_layer_is_computed_for_picked_tokens_only(form: str, reduces: list[int]) -> None:
    """Behind its attention nothing needs the others; nor do sums that only the end reads. The first is of lookups."""
    program = with_cache(gpt(3).lanes(2, FORMS[form]))
    assert program.cached is not None
    nodes = program.cached.step.graph.nodes
    picks = next(shape_of(node)[1] for node in nodes if node.name == PICKS)
    starts = [node for node in nodes if node.target is torch.ops.kraken.all_reduce_start.default]
    assert [int(same_size(shape_of(start)[1], picks)) for start in starts] == reduces
    products = [node for node in nodes if node.target is torch.ops.aten.linear.default]
    assert [same_size(shape_of(product)[1], picks) for product in products[-5:]] == [False, True, True, True, True]


def test_golden(golden: Golden) -> None:
    program = lowered(gpt(1))
    assert program.cached is not None
    golden("cache_attention", program.cached.step)
    golden("cache_tables", program.cached.tables)
