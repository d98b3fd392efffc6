from __future__ import annotations

import pytest

from kraken_compiler.ir.forms import FORMS
from kraken_compiler.ir.index_set import size
from kraken_compiler.passes.shard.degrees import even_degrees, kv_shares, padding, shared_groups, spread
from kraken_compiler.passes.shard.pick_kv_heads import PickKvHeads
from tests.passes.helpers import assert_close, recognized, targets
from tests.passes.models import Attention, Gpt

STANDARD = FORMS["standard"]


@pytest.mark.parametrize(("count", "degree"), [(8, 3), (9, 2), (14, 4), (5, 5), (97, 8), (12, 4)])
def test_positions_are_spread_evenly(count: int, degree: int) -> None:
    shares = spread(count, degree)
    owned = [position for share in shares for position in range(share.start, share.owned)]
    assert owned == list(range(count))
    assert max(share.owned - share.start for share in shares) - min(share.owned - share.start for share in shares) <= 1
    assert {share.stop - share.start for share in shares} == {-(-count // degree)}
    assert shares[-1].stop == shares[-1].owned == count


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(8, 2, 3), (9, 3, 2), (14, 2, 4), (12, 4, 6), (8, 8, 3)])
def test_lanes_hold_the_kv_heads_they_need(heads: int, kv_heads: int, degree: int) -> None:
    shares = kv_shares(heads, kv_heads, degree)
    assert len({stop - start for start, stop in shares}) == 1
    for mine, (start, stop) in zip(spread(heads, degree), shares, strict=True):
        needed = {head * kv_heads // heads for head in range(mine.start, mine.stop)}
        assert needed <= set(range(start, stop)) <= set(range(kv_heads))


def test_groups_that_lanes_share() -> None:
    assert not shared_groups(8, 2, 2)
    assert not shared_groups(8, 2, 8)
    assert not shared_groups(8, 8, 3)
    assert shared_groups(9, 3, 2)
    assert shared_groups(12, 4, 6)


def test_only_shared_groups_are_picked() -> None:
    """4 heads on 2 KV heads: on 3 lanes the second lane's two heads are those of both groups."""
    sample, program = recognized(Gpt(attention=lambda: Attention(2)))
    assert even_degrees(program.layers) == (1, 2, 4)
    assert padding(program.layers, 3, "attention") == pytest.approx(0.5)
    assert PickKvHeads(2).run(program).matches == 0
    result = PickKvHeads(3).run(program)
    assert result.matches == 2
    assert not result.rejections
    assert targets(program).count("aten.index_select") == 2
    assert PickKvHeads(3).run(program).matches == 0
    program.module.recompile()
    assert_close(sample.run(program), sample.expected())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_padded_lanes_compute_what_the_model_computes(kv_heads: int) -> None:
    sample, _ = recognized(Gpt(attention=lambda: Attention(kv_heads)))
    program = sample.lanes(3, STANDARD)
    assert_close(sample.run(program), sample.expected())
    padded = {
        spec.source
        for spec in program.weights.values()
        for shard in spec.shards
        if len(set(map(size, shard.lanes))) > 1
    }
    assert "blocks.0.attention.o.weight" in padded
