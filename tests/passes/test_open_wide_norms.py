"""Norms over split columns: opened, shared, reduced. Numbers of whole models are compared in the family tests."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor, nn

from kraken_compiler.ir.forms import FORMS, KRAKEN, STANDARD
from kraken_compiler.passes.pipelines import RECOGNIZE
from kraken_compiler.passes.shard.open_wide_norms import OpenWideNorms
from tests.passes.helpers import Sample, assert_close, captured, check_idempotent, check_pass, check_untouched, targets
from tests.passes.models import Attention, D, E, Gpt, H, WideAttention, WideFfn


@cache
def sample() -> Sample:
    return captured(Gpt(2, attention=WideAttention, ffn=WideFfn))


def test_opens_norms_over_split_columns() -> None:
    program = check_pass(OpenWideNorms(2), sample(), matches=6, before=RECOGNIZE)
    # Two means of q and of the FFN, one of k, in each of two layers.
    assert targets(program).count("kraken.mean_power") == 10
    names = {node.name for node in program.graph.nodes}
    assert all(set(branch.nodes) <= names for branch in program.layers.branches)


def test_norms_over_single_heads_and_one_lane_stay() -> None:
    class Narrow(Attention):
        def __init__(self) -> None:
            super().__init__(2)
            self.norm = nn.RMSNorm(E)

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().mix(self.norm(q), self.norm(k), v)

    check_untouched(OpenWideNorms(2), captured(Gpt(attention=Narrow)), before=RECOGNIZE)
    check_untouched(OpenWideNorms(1), sample(), before=RECOGNIZE)


@pytest.mark.parametrize("degree", [2, H])
def test_standard_is_exact(degree: int) -> None:
    """Also where several lanes hold a KV head, whose columns must count once."""
    program = sample().lanes(degree, STANDARD)
    assert_close(sample().run(program), sample().expected())
    # One for the rows of the embedding; of every branch one for the parts and one for the means: q's and k's travel
    # together.
    assert [reduce.index for reduce in program.plan.reduces] == list(range(9))
    assert [reduce.bytes_per_token // 8 for reduce in program.plan.reduces] == [D, *[3, D, 2, D] * 2]
    assert len(program.windows[1].gemms) == 1, "the values' projection hides the means of q and k"


def test_late_branches_take_the_mean_of_what_they_have() -> None:
    """Only the first branch of a kraken model reads what the source reads."""
    program = sample().lanes(2, KRAKEN)
    assert [reduce.is_lookup for reduce in program.plan.reduces] == [True, False, False, False]
    check_idempotent(OpenWideNorms(2), program)


def test_one_lane_is_the_source_model() -> None:
    for form in ("standard", "kraken"):
        program = sample().lanes(1, FORMS[form])
        assert_close(sample().run(program), sample().expected())
