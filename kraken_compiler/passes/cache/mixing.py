"""Detection of operators that let one token see another, or one row of a batch: only attention may mix tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import OpOverload, arguments_by_name, op_name
from kraken_compiler.ir.size_checks import BATCH, SEQUENCE
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import LANE_EMBEDDING, NORMS, PROJECTIONS, SHAPE_ONLY
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.shapes import is_tensor, same_size, shape_of, symbols_of

_TOKEN_BY_TOKEN = frozenset(
    {
        *PROJECTIONS,
        *SHAPE_ONLY,
        aten.embedding.default,
        LANE_EMBEDDING,
        aten.reshape.default,
        aten.permute.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.broadcast_to.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.dropout.default,
        torch.ops.kraken.all_reduce_start.default,
        torch.ops.kraken.wait.default,
        torch.ops.kraken.all_gather.default,
    }
)
_ALONG_DIM = {
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.cat.default: 1,
    aten.stack.default: 1,
    aten.softmax.int: 1,
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.index_select.default: 1,
    aten.repeat_interleave.self_int: 2,
    aten.unflatten.int: 1,
    aten.unbind.int: 1,
    aten.cumsum.default: 1,
    aten.gather.default: 1,
    aten.scatter.src: 1,
    aten.scatter.value: 1,
    aten.scatter_add.default: 1,
    aten.scatter_reduce.two: 1,
    aten.max.dim: 1,
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.var.correction: 1,
    aten.amax.default: 1,
    aten.linalg_vector_norm.default: 2,
    aten.glu.default: 1,
    aten.flip.default: 1,
    aten.diff.default: 2,
}
"""Operators that work along a dim, and which argument says along which."""

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default)
"""They take batches alone, and no image without a batch: the first dim is never worked along."""

_ROW_BY_ROW = (aten.repeat_interleave.self_int, aten.unflatten.int)
"""Those that keep the order of rows, so that they do not mix the tokens of a batch in one dim."""

_PARTS = {SEQUENCE: "tokens", BATCH: "rows"}

_FLATTENED = ((1, "start_dim", 0), (2, "end_dim", -1))


def mixes(node: fx.Node, size: Any, dim: str = SEQUENCE) -> str:
    """The reason why `node` may mix what lies along a dim; "" if it does not.

    Args:
        node: An operator that is no attention.
        size: The size of the dim.
        dim: What it is called, `sequence` or `batch`.
    """
    parts = _PARTS[dim]
    target = node.target
    if not isinstance(target, OpOverload):
        return ""
    name = op_name(target)
    if target is aten.reshape.default and _swaps(shape_of(node), shape_of(args_of(node)[0])):
        return f"{name} takes the {dim} for another dim"
    if target in _TOKEN_BY_TOKEN or torch.Tag.pointwise in target.tags:
        return ""
    operand = next((operand for operand in node.all_input_nodes if is_tensor(operand)), None)
    if operand is None:
        return ""
    if target is aten.batch_norm.default:
        return f"{name} takes the statistics of its batch" if args_of(node)[5] else ""
    if target in _CONVOLUTIONS:
        return f"{name} works along the {dim}" if any(_holds(one, size) for one in shape_of(operand)[1:]) else ""
    if target is aten.group_norm.default:
        merged_sizes = shape_of(operand)[1:]
        return f"{name} normalises over the {dim}" if any(same_size(merged, size) for merged in merged_sizes) else ""
    if target in NORMS:
        shape = argument(node, 1, "normalized_shape")
        return "" if all(isinstance(one, int) for one in shape) else f"{name} normalises over the {dim}"
    if target in _ALONG_DIM:
        shape = shape_of(operand)
        rank = len(shape) + (target is aten.stack.default)
        along = [shape[dim] for dim in dims_along(node, _ALONG_DIM[target], rank) if dim < len(shape)]
        is_mixed = same_size if target in _ROW_BY_ROW else _holds
        return f"{name} works along the {dim}" if any(is_mixed(one, size) for one in along) else ""
    if target is aten.flatten.using_ints:
        shape = shape_of(operand)
        first, last = (int(argument(node, place, name_, value)) % len(shape) for place, name_, value in _FLATTENED)
        merged_sizes = shape[first : last + 1]
        is_merged = len(merged_sizes) > 1 and any(_holds(merged, size) for merged in merged_sizes)
        return f"{name} merges the {dim} with another dim" if is_merged else ""
    if target is aten.index.Tensor:
        indexed_sizes = [one for one, index in zip(shape_of(args_of(node)[0]), args_of(node)[1]) if index is not None]
        return f"{name} picks {parts}" if any(_holds(one, size) for one in indexed_sizes) else ""
    return f"{name} may mix {parts}"


def dims_along(node: fx.Node, place: int, rank: int) -> list[int]:
    """The dims that an operator works along, from 0 on; all of them where it names none.

    Args:
        node: The operator.
        place: Which argument says along which.
        rank: Dims of what it works on.
    """
    dims = list(arguments_by_name(node).values())[place]
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [int(dim) % max(rank, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _holds(size: Any, sequence: Any) -> bool:
    """True if a dim of that size has the sequence in it, perhaps merged with other dims."""
    return bool(same_size(size, sequence)) or bool(symbols_of(size) & symbols_of(sequence))


def _swaps(after: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """True for a reshape after which a dim of unknown size lies elsewhere: what was one dim is taken for another."""
    orders = [[str(size.node.expr) for size in shape if symbols_of(size)] for shape in (before, after)]
    return size_groups(before) != size_groups(after) and sorted(orders[0]) == sorted(orders[1])


def size_groups(shape: Sequence[Any]) -> list[Any]:
    """The sizes of unknown number in their order, and between them the products of the others."""
    groups: list[Any] = [1]
    for size in shape:
        if symbols_of(size):
            groups += [str(size.node.expr), 1]
        else:
            groups[-1] *= int(size)
    return groups
