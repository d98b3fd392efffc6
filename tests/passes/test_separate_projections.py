from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kraken_compiler.ir.forms import FORMS
from kraken_compiler.passes.shard.separate_projections import SeparateProjections
from tests.passes.helpers import assert_close, recognized, targets
from tests.passes.models import D, E, FusedQkv, Gpt, H

STANDARD = FORMS["standard"]


class Partitioned(FusedQkv):
    """As CodeGen has it: a part for each of two devices, in it its heads' queries, then values, then keys."""

    def __init__(self) -> None:
        super().__init__("contiguous")

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = x_BSD.shape
        parts = self.qkv(x_BSD).view(batch, seq, 2, 3 * H // 2 * E).split(H // 2 * E, dim=-1)
        q, v, k = (part.reshape(batch, seq, H, E).transpose(1, 2) for part in parts)
        return q, k, v


class Scaled(Partitioned):
    """The projection's output is changed before it is divided into heads."""

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = x_BSD.shape
        fused = torch.tanh(self.qkv(x_BSD).view(batch, seq, 2, 3 * H // 2 * E))
        q, v, k = (part.reshape(batch, seq, H, E).transpose(1, 2) for part in fused.split(H // 2 * E, dim=-1))
        return q, k, v


MODELS = {"partitioned": Partitioned, "grouped": lambda: FusedQkv("grouped", 2)}


@pytest.mark.parametrize("name", MODELS)
def test_lanes_that_cut_groups_get_projections_of_their_own(name: str) -> None:
    sample, program = recognized(Gpt(attention=MODELS[name]))
    before = targets(program).count("aten.linear")
    result = SeparateProjections(3).run(program)
    assert (result.matches, result.rejections) == (1, ())
    assert targets(program).count("aten.linear") == before + 2
    rows = [spec for spec in program.weights.values() if spec.source == "blocks.0.attention.qkv.weight"]
    assert sum(spec.shape[0] for spec in rows) == rows[0].source_shape[0]
    assert {spec.shape[1] for spec in rows} == {D}
    program.module.recompile()
    assert_close(sample.run(program), sample.expected())
    assert SeparateProjections(3).run(program).matches == 0


@pytest.mark.parametrize("degree", [2, 4])
def test_lanes_that_cut_no_group_keep_the_projection(degree: int) -> None:
    for build in MODELS.values():
        _, program = recognized(Gpt(attention=build))
        assert SeparateProjections(degree).run(program).matches == 0


@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_heads_that_have_a_place_of_their_own_stay_together(layout: str) -> None:
    _, program = recognized(Gpt(attention=lambda: FusedQkv(layout)))
    assert SeparateProjections(3).run(program).matches == 0


def test_only_layout_may_lie_in_between() -> None:
    _, program = recognized(Gpt(attention=Scaled))
    assert SeparateProjections(3).run(program).matches == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_lanes_compute_what_the_model_computes(name: str, degree: int) -> None:
    sample, _ = recognized(Gpt(2, attention=MODELS[name]))
    assert_close(sample.run(sample.lanes(degree, STANDARD)), sample.expected())
