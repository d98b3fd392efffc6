"""Kept sets, seen as the parts of the weights that they lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.ir.index_set import IndexSet, from_indices
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.pipelines import RECOGNIZE
from kraken_compiler.passes.shard.plan_shards import PlanShards
from kraken_compiler.passes.shard.split_branches import SplitBranches
from tests.passes.helpers import captured, check_analysis, recognized
from tests.passes.models import (
    COLUMNS,
    AlibiAttention,
    Attention,
    D,
    E,
    FusedQkv,
    GainAttention,
    GatedFfn,
    Gpt,
    H,
    NormOverHeads,
)

Lanes = tuple[IndexSet, ...]


def kept(program: Program, source: str) -> dict[int, Lanes]:
    """Lane parts of a source tensor, by dim."""
    (spec,) = (spec for spec in program.weights.values() if spec.source == source)
    return {shard.dim: shard.lanes for shard in spec.shards}


def split(module: nn.Module, degree: int) -> Split:
    _, program = recognized(module)
    planned: Split = check_analysis(PlanShards(degree), program, "shards")
    SplitBranches(degree).run(planned)
    return planned


def heads(*lanes: list[int], width: int = E, start: int = 0) -> Lanes:
    """Rows of whole heads: head h occupies `width` rows from `start + h * width`."""
    return tuple(from_indices(start + head * width + row for head in lane for row in range(width)) for lane in lanes)


def joined(*parts: Lanes) -> Lanes:
    """Lane by lane union of ascending parts."""
    return tuple(tuple(piece for part in lane for piece in part) for lane in zip(*parts, strict=True))


def attention(kv_heads: int) -> Callable[[], nn.Module]:
    return lambda: Attention(kv_heads)


def fused(layout: str, kv_heads: int) -> Callable[[], nn.Module]:
    return lambda: FusedQkv(layout, kv_heads)


@pytest.mark.parametrize(
    ("kv_heads", "degree", "want"),
    [
        (4, 2, ([0, 1], [2, 3])),
        (4, 4, ([0], [1], [2], [3])),
        (2, 2, ([0], [1])),
        (2, 4, ([0], [0], [1], [1])),
        (1, 4, ([0], [0], [0], [0])),
    ],
)
def test_separate_projections(kv_heads: int, degree: int, want: tuple[list[int], ...]) -> None:
    """Queries are divided; key and value heads are divided or, beyond their number, replicated."""
    program = split(Gpt(attention=attention(kv_heads)), degree)
    size = H // degree
    queries = heads(*(list(range(lane * size, (lane + 1) * size)) for lane in range(degree)))
    path = "blocks.0.attention"
    assert kept(program, f"{path}.q.weight") == kept(program, f"{path}.q.bias") == {0: queries}
    assert kept(program, f"{path}.o.weight") == {1: queries}
    whole = kv_heads == 1
    for name in ("k", "v"):
        assert kept(program, f"{path}.{name}.weight") == ({} if whole else {0: heads(*want)})
        assert kept(program, f"{path}.{name}.bias") == ({} if whole else {0: heads(*want)})
    columns = COLUMNS // degree
    ffn = tuple(((lane * columns, (lane + 1) * columns),) for lane in range(degree))
    assert kept(program, "blocks.0.ffn.up.weight") == {0: ffn}
    assert kept(program, "blocks.0.ffn.down.weight") == {1: ffn}


def test_an_output_bias_is_shared_among_the_lanes() -> None:
    program = split(Gpt(), 4)
    scales = {spec.source: spec.scale for spec in program.weights.values() if spec.scale != 1.0}
    assert scales == {"blocks.0.attention.o.bias": 0.25, "blocks.0.ffn.down.bias": 0.25}


@pytest.mark.parametrize(
    ("layout", "kv_heads", "degree", "want"),
    [
        ("contiguous", 4, 2, joined(*(heads([0, 1], [2, 3], start=part * H * E) for part in range(3)))),
        ("contiguous", 2, 2, joined(heads([0, 1], [2, 3]), heads([0], [1], start=16), heads([0], [1], start=24))),
        (
            "contiguous",
            2,
            4,
            joined(heads([0], [1], [2], [3]), heads([0], [0], [1], [1], start=16), heads([0], [0], [1], [1], start=24)),
        ),
        ("interleaved", 4, 4, heads([0], [1], [2], [3], width=3 * E)),
        ("grouped", 2, 2, heads([0], [1], width=4 * E)),
        # Blocks of q0 q1 k v | q2 q3 k v: each lane takes one query and a copy of its group's key and value.
        ("grouped", 2, 4, heads([0, 2, 3], [1, 2, 3], [4, 6, 7], [5, 6, 7])),
    ],
)
def test_fused_projections(layout: str, kv_heads: int, degree: int, want: Lanes) -> None:
    program = split(Gpt(attention=fused(layout, kv_heads)), degree)
    assert kept(program, "blocks.0.attention.qkv.weight") == {0: tuple(map(merged, want))}
    assert kept(program, "blocks.0.attention.qkv.bias") == {0: tuple(map(merged, want))}


def merged(ranges: IndexSet) -> IndexSet:
    """Ranges with touching neighbours made one."""
    return from_indices(index for start, stop in ranges for index in range(start, stop))


@pytest.mark.parametrize(
    ("layout", "want"),
    [
        ("chunk", (((0, 12), (24, 36)), ((12, 24), (36, 48)))),
        ("interleaved", (((0, 24),), ((24, 48),))),
    ],
)
def test_fused_gate_and_up(layout: str, want: Lanes) -> None:
    program = split(Gpt(ffn=lambda: GatedFfn(layout)), 2)
    assert kept(program, "blocks.0.ffn.gate_up.weight") == {0: want}


def test_what_enters_from_the_side_is_cut_to_the_lanes_heads() -> None:
    """The ALiBi bias is computed whole on every lane; of its heads a lane keeps its own."""
    _, program = recognized(Gpt(attention=AlibiAttention))
    program = check_analysis(PlanShards(2), program, "shards")
    sides = {
        name: sets
        for name, sets in program.shards[0].kept_sets.items()
        if name not in (*program.shards[0].inputs, *program.shards[0].region)
    }
    (bias,) = sides.values()
    assert bias == (None, (((0, 2),), ((2, 4),)), None, None)


def test_gains_per_head() -> None:
    program = split(Gpt(attention=GainAttention), 2)
    assert kept(program, "blocks.0.attention.q_gain") == {0: (((0, 2),), ((2, 4),))}


def test_relu_does_not_hide_columns() -> None:
    """A zero gradient must mean "does not depend", not "was negative"."""

    class Relu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, COLUMNS), nn.Linear(COLUMNS, D)

        def forward(self, x_BSD: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x_BSD)).square())

    program = split(Gpt(ffn=Relu), 4)
    assert kept(program, "blocks.0.ffn.up.weight") == {0: heads([0], [1], [2], [3], width=6)}


def test_twins_are_probed_once() -> None:
    _, program = recognized(Gpt(layers=3))
    result = PlanShards(2).run(program)
    assert result.matches == 2
    assert isinstance(result.program, Split)
    shards = result.program.shards
    assert [plan.branch for plan in shards] == [1, 2, 3, 4, 5, 6]
    assert len({plan.output for plan in shards}) == 6
    assert shards[0].columns == shards[4].columns


def test_layers_that_differ_are_probed_apart() -> None:
    model = Gpt(layers=2)
    model.blocks[1].attention = FusedQkv("interleaved")
    _, program = recognized(model)
    assert PlanShards(2).run(program).matches == 3


class ShuffledHeads(Attention):
    """Heads trade halves after attention, so that no lane's columns are its own."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y_BHSE = super().mix(q, k, v)
        return torch.cat([y_BHSE[..., :2], y_BHSE.flip(1)[..., 2:]], dim=-1)


class SummedHeads(Attention):
    """Every head gets the mean of all heads added."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y_BHSE = super().mix(q, k, v)
        return y_BHSE + y_BHSE.mean(1, keepdim=True)


class NormalizedHeads(Attention):
    """Queries are scaled by their length over all heads, without a weight."""

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x_BSD)
        return q / q.norm(dim=(1, 3), keepdim=True), k, v


class SoftmaxedColumns(nn.Module):
    """The FFN's columns compete."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, COLUMNS), nn.Linear(COLUMNS, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(torch.softmax(self.up(x_BSD), -1))


@pytest.mark.parametrize("attention", [NormOverHeads, ShuffledHeads, SummedHeads, NormalizedHeads])
def test_rejects_what_mixes_heads(attention: type[Attention]) -> None:
    reject(Gpt(attention=attention), "blocks.0.attention")


def test_rejects_what_mixes_columns() -> None:
    reject(Gpt(ffn=SoftmaxedColumns), "blocks.0.ffn")


def reject(module: nn.Module, path: str) -> None:
    pipeline: list[Pass[Any]] = [*RECOGNIZE, PlanShards(2), SplitBranches(2)]
    rejection = captured(module).rejection(*pipeline)
    assert rejection.path.startswith(path)
    assert rejection.nodes
    assert "mixes" in rejection.reason or "lane" in rejection.reason
