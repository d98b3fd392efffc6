"""Means over split columns, lane by lane; what they add up to is tested in test_reduce_means.py."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import Split
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.pipelines import RECOGNIZE, split_over
from kraken_compiler.passes.shard.share_means import MEAN, ShareMeans
from kraken_compiler.passes.shard.split_head import SplitHead
from kraken_compiler.passes.stages import schedule
from tests.passes.helpers import Sample, assert_close, captured, check_idempotent, check_untouched, gpt, targets
from tests.passes.models import COLUMNS, Attention, E, Gpt, H, WideAttention, WideFfn

KV_HEADS = 2


@cache
def sample() -> Sample:
    return captured(Gpt(attention=WideAttention, ffn=WideFfn))


def before(degree: int) -> list[Pass[Split]]:
    """Everything up to the pass."""
    pipeline = [*RECOGNIZE, *split_over(degree)]
    return pipeline[: pipeline.index(ShareMeans())]


def means(program: Split) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is MEAN]


def shared(sample: Sample, degree: int) -> Split:
    program: Split = sample.after(*before(degree), ShareMeans())
    check_idempotent(ShareMeans(), program)
    assert_close(
        sample.run(schedule(sample.after(*before(degree), ShareMeans(), SplitHead()), STANDARD)), sample.expected()
    )
    return program


def test_every_column_counts_once() -> None:
    """Two lanes, each with its own KV head: nothing is held twice, so no lane needs a factor."""
    program = shared(sample(), 2)
    assert [node.args[1:] for node in means(program)] == [
        *((power, H * E, None) for power in (2, 1)),
        (2, KV_HEADS * E, None),
        *((power, COLUMNS, None) for power in (2, 1)),
    ]
    assert not [source for source in program.constants if "share" in source]


def test_columns_that_all_lanes_hold_alike_count_by_the_width() -> None:
    """Four lanes on two KV heads: every column of the keys is there twice, which the width makes up for."""
    program = shared(sample(), 4)
    assert [node.args[2] for node in means(program)] == [H * E, H * E, 2 * KV_HEADS * E, COLUMNS, COLUMNS]


def test_columns_that_some_lanes_hold_count_by_their_share() -> None:
    """Three lanes on two KV heads: one of them is there more often than the other."""
    program = shared(sample(), 3)
    weights = {name: spec.source for name, spec in program.weights.items()}
    sources = [weights[node.args[3].name] for node in means(program) if isinstance(node.args[3], fx.Node)]
    assert sources
    for source in sources:
        held = [float(count) for count in source.removeprefix("kraken.share.").partition(":")[0].split(".")]
        assert program.constants[source].tolist() == pytest.approx([1 / max(1.0, count) for count in held])


def test_a_share_is_as_exact_as_its_mean() -> None:
    """A third in single precision would round a norm of double precision."""
    double = captured(Gpt(attention=WideAttention, ffn=WideFfn).double()).after(*before(3), ShareMeans())
    shares = [value for source, value in double.constants.items() if source.startswith("kraken.share.")]
    assert shares
    assert {value.dtype for value in shares} == {torch.float64}


def test_what_every_lane_has_whole_needs_no_other_lane() -> None:
    """The one key head of multi-query attention is on all lanes, so that each takes its mean by itself."""

    class OneKey(Attention):
        def __init__(self) -> None:
            super().__init__(1)
            self.norm = nn.RMSNorm(2 * E, eps=1e-6)

        def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().project(x_BSD)
            k = k * self.norm(k.repeat(1, 1, 1, 2))[..., :E]
            return q, k, v

    program = shared(captured(Gpt(attention=OneKey)), 2)
    assert not means(program)
    assert targets(program).count("aten.sum.dim_IntList") == 1


def test_a_model_without_norms_over_split_columns_is_left_alone() -> None:
    check_untouched(ShareMeans(), gpt(), before=before(2))
