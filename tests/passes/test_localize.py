"""Every rule on its own: the rewritten node, run on a lane's parts, gives the lane's part of the whole result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import to_indices
from kraken_compiler.ir.shards import Kept, KeptDim
from kraken_compiler.passes.graph_tools import aten
from kraken_compiler.passes.shard.localize import localize

HALVES: KeptDim = (((0, 4),), ((4, 8),))
"""Eight positions, four a lane."""
COMB: KeptDim = (((0, 2), (4, 6)), ((2, 4), (6, 8)))
"""Two blocks of four, two of each a lane: a fused projection."""
WHOLE = torch.arange(3 * 8.0).reshape(3, 8)


def cut(value: Tensor, kept: Kept | None, lane: int) -> Tensor:
    for dim, lanes in enumerate(kept or ()):
        if lanes is not None:
            value = value.index_select(dim, torch.tensor(to_indices(lanes[lane])))
    return value


def localized(
    target: Any, args: tuple[Any, ...], into: Kept, out: Kept | None, whole: Tensor = WHOLE, known: Tensor | None = None
) -> fx.Node | Rejection:
    """Localize target(x, *args); a tensor among `args` is `known`. Checks the result on both lanes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    positions = graph.placeholder("positions")
    args = fx.node.map_aggregate(args, lambda value: positions if isinstance(value, Tensor) else value)
    node = graph.call_function(target, (x, *args))

    def run(value: Tensor, constant: Tensor | None) -> Any:
        feed = {x: value, positions: constant}
        ready = fx.node.map_arg(node.args, feed.__getitem__)
        return node.target(*ready)

    expected = run(whole, known)
    shapes = {"x": tuple(whole.shape)}
    if isinstance(expected, Tensor):
        shapes[node.name] = tuple(expected.shape)
    sets = {"x": into} | ({node.name: out} if out is not None else {})
    result = localize(node, sets, shapes, {} if known is None else {"positions": known})
    if isinstance(result, Rejection):
        return result
    moved = result.get(positions, known)
    for lane in range(2):
        # One more dim than before: a row for every lane.
        own = moved[lane] if moved is not None and known is not None and moved.dim() > known.dim() else moved
        have = run(cut(whole, into, lane), own)
        if isinstance(expected, Tensor):
            assert torch.equal(have, cut(expected, out, lane))
        elif out is not None:
            assert all(torch.equal(mine, cut(piece, out, lane)) for mine, piece in zip(have, expected, strict=True))
        else:
            # The pieces of a split dim: what the lane holds of each whole piece, in order.
            local = cut(whole, into, lane)
            for mine, piece in zip(have, expected, strict=True):
                held = [column for column in local.T if any(torch.equal(column, other) for other in piece.T)]
                assert torch.equal(mine, torch.stack(held, dim=1))
    return node


def fine(node: fx.Node | Rejection) -> fx.Node:
    assert isinstance(node, fx.Node), node
    return node


def refused(node: fx.Node | Rejection) -> str:
    assert isinstance(node, Rejection), node
    assert node.nodes
    return node.reason


def test_reshape_and_expand_take_the_lanes_size() -> None:
    heads: Kept = (None, (((0, 2),), ((2, 4),)), None)
    assert fine(localized(aten.reshape.default, ([3, 4, 2],), (None, HALVES), heads)).args[1] == [3, 2, 2]
    assert fine(localized(aten.reshape.default, ([3, -1, 2],), (None, HALVES), heads)).args[1] == [3, -1, 2]
    wide: Kept = (None, None, HALVES)
    node = fine(localized(aten.expand.default, ([2, 3, 8],), (None, HALVES), wide))
    assert node.args[1] == [2, 3, 4]


def test_unflatten() -> None:
    heads: Kept = (None, (((0, 2),), ((2, 4),)), None)
    assert fine(localized(aten.unflatten.int, (-1, [4, 2]), (None, HALVES), heads)).args[2] == [2, 2]
    assert fine(localized(aten.unflatten.int, (1, [-1, 2]), (None, HALVES), heads)).args[2] in ([2, 2], [-1, 2])


def test_slice() -> None:
    """The first half of each lane's comb is the lane's part of the first half of the whole."""
    first: Kept = (None, (((0, 2),), ((2, 4),)))
    assert fine(localized(aten.slice.Tensor, (1, 0, 4), (None, COMB), first)).args[1:4] == (1, 0, 2)
    assert fine(localized(aten.slice.Tensor, (-1, -4, None), (None, COMB), first)).args[1:4] == (1, 2, 4)
    every_other = fine(localized(aten.slice.Tensor, (1, 1, None, 2), (None, HALVES), first))
    assert every_other.args[1:] == (1, 1, 4, 2)
    other_dim = fine(localized(aten.slice.Tensor, (0, 1, 3), (None, HALVES), (None, HALVES)))
    assert other_dim.args[1:] == (0, 1, 3)


def test_slices_that_only_some_lanes_hold_are_refused() -> None:
    assert "not at the same place on every lane" in refused(
        localized(aten.slice.Tensor, (1, 0, 3), (None, HALVES), None)
    )
    assert refused(localized(aten.slice.Tensor, (1, 0, 4), (None, HALVES), None))


def test_select() -> None:
    shared: KeptDim = (((0, 1), (7, 8)), ((3, 4), (7, 8)))
    node = fine(localized(aten.select.int, (1, 7), (None, shared), (None,)))
    assert node.args[1:] == (1, 1)
    assert fine(localized(aten.select.int, (-1, -1), (None, shared), (None,))).args[1:] == (1, 1)
    assert fine(localized(aten.select.int, (0, -1), (None, HALVES), (HALVES,))).args[1:] == (0, -1)
    assert refused(localized(aten.select.int, (1, 0), (None, HALVES), None))


@pytest.mark.parametrize(
    ("target", "args", "sizes"),
    [
        (aten.split.Tensor, (4, 1), [2, 2]),
        (aten.split.Tensor, (4, -1), [2, 2]),
        (aten.split_with_sizes.default, ([4, 4], 1), [2, 2]),
        (aten.chunk.default, (2, 1), [2, 2]),
    ],
)
def test_splits_cut_where_the_whole_was_cut(target: Any, args: tuple[Any, ...], sizes: list[int]) -> None:
    node = fine(localized(target, args, (None, COMB), None))
    assert node.target is aten.split_with_sizes.default
    assert node.args[1:] == (sizes, 1)


def test_uneven_splits() -> None:
    uneven: KeptDim = (((0, 3), (6, 7)), ((3, 6), (7, 8)))
    assert fine(localized(aten.split.Tensor, (6, 1), (None, uneven), None)).args[1] == [3, 1]
    assert fine(localized(aten.split_with_sizes.default, ([6, 2], 1), (None, uneven), None)).args[1] == [3, 1]
    assert refused(localized(aten.split.Tensor, (3, 1), (None, HALVES), None))
    assert fine(localized(aten.split.Tensor, (1, 0), (None, HALVES), (None, HALVES))).target is aten.split.Tensor


def test_repeat_interleave() -> None:
    """Four KV heads repeated to eight; beyond their number, a lane has one head and repeats it less."""
    four = torch.arange(12.0).reshape(3, 4)
    pairs: KeptDim = (((0, 2),), ((2, 4),))
    node = fine(localized(aten.repeat_interleave.self_int, (2, 1), (None, pairs), (None, HALVES), four))
    assert node.args[1:] == (2, 1)
    one = torch.arange(3.0).reshape(3, 1)
    node = fine(localized(aten.repeat_interleave.self_int, (8, 1), (None, None), (None, HALVES), one))
    assert node.args[1:] == (4, 1)


def test_index_moves_its_positions() -> None:
    positions = torch.tensor([7, 6])
    shared: KeptDim = (((0, 2), (6, 8)), ((3, 5), (6, 8)))
    fine(localized(aten.index.Tensor, ([None, positions],), (None, shared), None, known=positions))
    fine(localized(aten.index.Tensor, ([positions - 6, None],), (None, HALVES), (None, HALVES), known=positions - 6))
    assert refused(localized(aten.index.Tensor, ([None, positions],), (None, HALVES), None, known=positions))
    mask = torch.arange(8) > 3
    assert refused(localized(aten.index.Tensor, ([None, mask],), (None, HALVES), None, known=mask))


def test_a_computed_size_of_a_split_dim_is_refused() -> None:
    graph = fx.Graph()
    x, length = graph.placeholder("x"), graph.placeholder("length")
    node = graph.call_function(aten.reshape.default, (x, [3, length]))
    result = localize(node, {"x": (None, HALVES), node.name: (None, HALVES)}, {"x": (3, 8), node.name: (3, 8)}, {})
    assert isinstance(result, Rejection)
    assert "computed" in result.reason


def test_what_has_no_rule_is_left_alone() -> None:
    node = fine(localized(aten.cos.default, (), (None, HALVES), (None, HALVES)))
    assert len(node.args) == 1


def test_index_select_picks_for_every_lane_where_it_holds_what_it_needs() -> None:
    pairs = torch.arange(8) // 2
    some: KeptDim = (((0, 3),), ((2, 5),))
    lanes: KeptDim = (((0, 4),), ((4, 8),))
    fine(localized(aten.index_select.default, (1, pairs), (None, some), (None, lanes), known=pairs))
    fine(localized(aten.index_select.default, (1, pairs), (None, None), (None, lanes), known=pairs))
    fine(localized(aten.index_select.default, (-1, pairs), (None, some), (None, (((1, 5),), ((4, 8),))), known=pairs))
    assert refused(localized(aten.index_select.default, (1, pairs), (None, lanes), (None, some[::-1]), known=pairs))
    other_dim = torch.tensor([2, 0])
    fine(localized(aten.index_select.default, (0, other_dim), (None, HALVES), (None, HALVES), known=other_dim))
