from __future__ import annotations

import torch

from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import DimShard, WeightSpec, lane_weights

WHOLE = torch.arange(30.0).reshape(5, 6)


def spec(*shards: DimShard, scale: float = 1.0) -> WeightSpec:
    return WeightSpec("p_w", "w", (5, 6), "float32", "parameter", shards, scale)


def test_a_whole_tensor_is_the_same_on_every_lane() -> None:
    whole = spec()
    assert whole.shape == (5, 6)
    assert whole.nbytes == 30 * 4
    assert torch.equal(whole.take(WHOLE, 0), WHOLE)
    assert torch.equal(whole.take(WHOLE, 1), WHOLE)


def test_lanes_take_their_ranges_in_order() -> None:
    """Several ranges, and lanes that overlap, as replicated KV heads do."""
    rows = spec(DimShard(0, (((0, 1), (3, 5)), ((1, 2), (3, 5)))))
    assert rows.shape == (3, 6)
    assert torch.equal(rows.take(WHOLE, 0), WHOLE[[0, 3, 4]])
    assert torch.equal(rows.take(WHOLE, 1), WHOLE[[1, 3, 4]])


def test_two_dims_can_be_split() -> None:
    block = spec(DimShard(0, (((0, 2),), ((2, 4),))), DimShard(1, (((0, 3),), ((3, 6),))))
    assert block.shape == (2, 3)
    assert torch.equal(block.take(WHOLE, 1), WHOLE[2:4, 3:])


def test_a_short_lane_is_padded_with_zeros() -> None:
    """A vocabulary that the degree does not divide."""
    rows = spec(DimShard(0, (((0, 3),), ((3, 5),))), scale=0.5)
    assert rows.shape == (3, 6)
    last = rows.take(WHOLE, 1)
    assert torch.equal(last[:2], WHOLE[3:] / 2)
    assert not last[2].any()


def test_a_part_owns_its_memory_and_is_contiguous() -> None:
    column = spec(DimShard(1, (((0, 2),), ((2, 4),)))).take(WHOLE, 1)
    assert column.is_contiguous()
    assert column.untyped_storage().data_ptr() != WHOLE.untyped_storage().data_ptr()
    assert column.untyped_storage().nbytes() == column.numel() * 4


def test_sizes_know_the_dtype() -> None:
    half = WeightSpec("p_w", "w", (5, 6), "bfloat16", "parameter")
    assert half.torch_dtype is torch.bfloat16
    assert half.nbytes == 60


def test_lane_weights_reads_by_source_name() -> None:
    rows = spec(DimShard(0, (((0, 1),), ((1, 2),))))
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return WHOLE

    weights = lane_weights({"p_w": rows}, 1, SourceReader(read))
    assert asked == ["w"]
    assert torch.equal(weights["p_w"], WHOLE[1:2])
