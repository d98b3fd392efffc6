"""Rewrite the literal sizes and positions of one node so that it works on a lane's part of its operands."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import IndexSet, size, to_indices
from kraken_compiler.ir.shards import Kept, KeptDim
from kraken_compiler.passes.graph_tools import args_of, argument, aten, module_path
from kraken_compiler.passes.shard.degrees import DEGREE_HINT

_SIZED = frozenset({aten.reshape.default, aten.expand.default})
_REPEATS = frozenset({aten.repeat_interleave.self_int, aten.repeat.default})
_GROUPED: dict[Any, tuple[int, str]] = {
    aten.group_norm.default: (1, "num_groups"),
    **dict.fromkeys(
        (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding), (6, "groups")
    ),
}
"""Operators on groups of channels, which are dim 1, and which argument says how many."""
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})


def localize(
    node: fx.Node, kept_sets: dict[str, Kept], shapes: dict[str, tuple[Any, ...]], constants: dict[str, Tensor]
) -> Rejection | dict[fx.Node, Tensor]:
    """Change `node`'s literals in place.

    Args:
        node: A node between a branch's projections.
        kept_sets: Kept sets by node name.
        shapes: Shapes before the split, by node name.
        constants: Values of constants, by node name.

    Returns:
        Constants that must take new values for this node (positions that moved), or a rejection. A value with one more
        dim than its constant has a row for every lane.
    """
    out = kept_sets.get(node.name)
    operand = args_of(node)[0] if args_of(node) and isinstance(args_of(node)[0], fx.Node) else None
    into = kept_sets.get(operand.name) if operand is not None else None
    if node.target in _SIZED and out is not None:
        return _resize(node, out)
    if node.target in _REPEATS and (out is not None or into is not None):
        return _repeat(node, shapes, into, out)
    if node.target is aten.index_select.default and operand is not None and (into is not None or out is not None):
        return _pick(node, shapes[operand.name], into, out, constants)
    if operand is None or into is None:
        return {}
    before = shapes[operand.name]
    if node.target is aten.unflatten.int and out is not None:
        dim = int(args_of(node)[1]) % len(before)
        local = [size(entry[0]) if entry else None for entry in out[dim:]]
        sizes = [new if new is not None else old for old, new in zip(args_of(node)[2], local)]
        node.args = (operand, dim, sizes)
        return {}
    if node.target is aten.slice.Tensor:
        dim = int(argument(node, 1, "dim", 0)) % len(before)
        return _slice(node, dim, before[dim], into[dim])
    if node.target is aten.select.int:
        dim = int(args_of(node)[1]) % len(before)
        rank = _rank(into[dim], int(args_of(node)[2]) % int(before[dim])) if into[dim] else int(args_of(node)[2])
        if rank is None:
            return _reject_positions(node)
        node.args = (operand, dim, rank)
        return {}
    if node.target in _SPLITS:
        return _split(node, operand, before, into)
    if node.target is aten.index.Tensor:
        return _index(node, before, into, constants)
    if node.target in _GROUPED:
        return _regroup(node, into, int(before[1]))
    return {}


def _regroup(node: fx.Node, into: Kept, channels: int) -> Rejection | dict[fx.Node, Tensor]:
    """A lane that holds whole groups of channels has fewer groups of the same size."""
    place, name = _GROUPED[node.target]
    groups, lanes = int(argument(node, place, name, 1)), into[1]
    if lanes is None or groups == 1:
        return {}
    width = channels // groups
    if any(start % width or stop % width for lane in lanes for start, stop in lane):
        return _reject_positions(node)
    local_groups = size(lanes[0]) // width
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: local_groups}
    else:
        node.args = (*args_of(node)[:place], local_groups, *args_of(node)[place + 1 :])
    return {}


def _reject_positions(node: fx.Node) -> Rejection:
    reason = "it picks fixed positions of a split dimension that are not at the same place on every lane"
    return Rejection(reason, (node.name,), module_path(node), DEGREE_HINT)


def _resize(node: fx.Node, out: Kept) -> Rejection | dict[fx.Node, Tensor]:
    sizes = list(argument(node, 1, "shape" if node.target is aten.reshape.default else "size"))
    for dim, lanes in enumerate(out):
        if lanes is None or sizes[dim] == -1:
            continue
        if isinstance(sizes[dim], fx.Node):
            reason = "a split dimension has a size that is computed, not a number"
            return Rejection(reason, (node.name,), module_path(node), DEGREE_HINT)
        sizes[dim] = size(lanes[0])
    node.args = (args_of(node)[0], sizes)
    return {}


def _repeat(
    node: fx.Node, shapes: dict[str, tuple[Any, ...]], into: Kept | None, out: Kept | None
) -> dict[fx.Node, Tensor]:
    """Repeat a lane's heads as often as it needs them."""
    before, after = shapes[args_of(node)[0].name], shapes[node.name]

    def local(sets: Kept | None, dim: int, whole: tuple[Any, ...]) -> Any:
        lanes = sets[dim] if sets is not None else None
        return size(lanes[0]) if lanes is not None else whole[dim]

    if node.target is aten.repeat_interleave.self_int:
        dim = int(argument(node, 2, "dim")) % len(before)
        if isinstance(before[dim], int):
            node.args = (args_of(node)[0], local(out, dim, after) // local(into, dim, before), dim)
        return {}
    repeats = list(args_of(node)[1])
    offset = len(after) - len(before)
    for dim, lanes in enumerate(out or ()):
        if lanes is not None:
            repeats[dim] = size(lanes[0]) // (local(into, dim - offset, before) if dim >= offset else 1)
    node.args = (args_of(node)[0], repeats)
    return {}


def _rank(lanes: KeptDim, position: int) -> int | None:
    """The local place of a global position, if it is the same on every lane."""
    assert lanes is not None
    places = set()
    for index_set in lanes:
        indices = to_indices(index_set)
        places.add(indices.index(position) if position in indices else None)
    return places.pop() if len(places) == 1 else None


def _slice(node: fx.Node, dim: int, before: Any, lanes: KeptDim) -> Rejection | dict[fx.Node, Tensor]:
    if lanes is None:
        return {}
    start, stop, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    if any(isinstance(bound, fx.Node) for bound in (start, stop)):
        return _reject_positions(node)
    positions = set(range(*slice(start, stop, step).indices(int(before))))
    local = {tuple(_places(index_set, positions)) for index_set in lanes}
    places = local.pop() if len(local) == 1 else ()
    strides = {later - earlier for earlier, later in itertools.pairwise(places)} or {1}
    if not places or len(strides) > 1:
        return _reject_positions(node)
    node.args = (args_of(node)[0], dim, places[0], places[-1] + 1, strides.pop())
    node.kwargs = {}
    return {}


def _places(index_set: IndexSet, positions: set[int]) -> list[int]:
    return [place for place, index in enumerate(to_indices(index_set)) if index in positions]


def _split(node: fx.Node, operand: fx.Node, before: tuple[Any, ...], into: Kept) -> Rejection | dict[fx.Node, Tensor]:
    """Cut the local tensor where the whole one was cut."""
    dim = int(argument(node, 2, "dim", 0)) % len(before)
    lanes = into[dim]
    if lanes is None:
        return {}
    total = int(before[dim])
    if node.target is aten.split_with_sizes.default:
        sizes = [int(length) for length in args_of(node)[1]]
    elif node.target is aten.chunk.default:
        length = -(-total // int(args_of(node)[1]))
        sizes = [min(length, total - start) for start in range(0, total, length)]
    else:
        length = int(args_of(node)[1])
        sizes = [min(length, total - start) for start in range(0, total, length)]
    bounds = [sum(sizes[:position]) for position in range(len(sizes) + 1)]
    local = {
        tuple(
            sum(start <= index < stop for index in to_indices(index_set)) for start, stop in itertools.pairwise(bounds)
        )
        for index_set in lanes
    }
    if len(local) > 1:
        return _reject_positions(node)
    node.target = aten.split_with_sizes.default
    node.args = (operand, list(local.pop()), dim)
    node.kwargs = {}
    return {}


def _pick(
    node: fx.Node, before: tuple[Any, ...], into: Kept | None, out: Kept | None, constants: dict[str, Tensor]
) -> Rejection | dict[fx.Node, Tensor]:
    """index_select: every lane picks for its own positions of the result, from where it holds what they need."""
    dim = int(args_of(node)[1]) % len(before)
    numbers = args_of(node)[2]
    in_sets, out_sets = (sets[dim] if sets is not None else None for sets in (into, out))
    if in_sets is None and out_sets is None:
        return {}
    values = constants.get(numbers.name)
    if values is None:
        return _reject_positions(node)
    picks = values.tolist()
    rows = []
    for lane in range(len(in_sets or out_sets or ())):
        local_positions = to_indices(in_sets[lane]) if in_sets is not None else list(range(int(before[dim])))
        lane_picks = [
            picks[place] for place in (to_indices(out_sets[lane]) if out_sets is not None else range(len(picks)))
        ]
        if not set(lane_picks) <= set(local_positions):
            return _reject_positions(node)
        rows.append([local_positions.index(number) for number in lane_picks])
    alike = all(row == rows[0] for row in rows)
    return {numbers: torch.tensor(rows[0] if alike else rows, dtype=values.dtype)}


def _index(
    node: fx.Node, before: tuple[Any, ...], into: Kept, constants: dict[str, Tensor]
) -> Rejection | dict[fx.Node, Tensor]:
    """x[..., positions]: the positions move to where the lane holds those elements."""
    new_values: dict[fx.Node, Tensor] = {}
    for dim, positions in enumerate(args_of(node)[1]):
        lanes = into[dim]
        if positions is None or lanes is None:
            continue
        values = constants.get(positions.name)
        if values is None or values.dtype == torch.bool:
            return _reject_positions(node)
        places = [_rank(lanes, int(value) % int(before[dim])) for value in values.flatten().tolist()]
        if any(place is None for place in places):
            return _reject_positions(node)
        new_values[positions] = torch.tensor(places, dtype=values.dtype).reshape(values.shape)
    return new_values
