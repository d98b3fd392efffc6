"""Detection of operators that let one token see another. Only attention may, or a KV cache is not enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import OpOverload, arguments_by_name, op_name
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import NORMS, PROJECTIONS, SHAPE_ONLY
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.shapes import is_tensor, same_size, shape_of, symbols_of

_TOKEN_BY_TOKEN = frozenset(
    {
        *PROJECTIONS,
        *SHAPE_ONLY,
        aten.embedding.default,
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
}
"""Operators that work along a dim, and which argument says along which."""

_ROW_BY_ROW = (aten.repeat_interleave.self_int, aten.unflatten.int)
"""Those that keep the order of rows, so that they do not mix the tokens of a batch in one dim."""

_FLATTENED = ((1, "start_dim", 0), (2, "end_dim", -1))


def mixes_tokens(node: fx.Node, sequence: Any) -> str:
    """The reason why `node` may mix tokens; "" if it does not.

    Args:
        node: An operator that is no attention.
        sequence: The size of the sequence dim.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return ""
    name = op_name(target)
    if target is aten.reshape.default and _swaps(shape_of(node), shape_of(args_of(node)[0])):
        return f"{name} takes the sequence for another dim"
    if target in _TOKEN_BY_TOKEN or torch.Tag.pointwise in target.tags:
        return ""
    operand = next((operand for operand in node.all_input_nodes if is_tensor(operand)), None)
    if operand is None:
        return ""
    if target is aten.batch_norm.default:
        return f"{name} takes the statistics of its batch" if args_of(node)[5] else ""
    if target is aten.group_norm.default:
        merged_sizes = shape_of(operand)[1:]
        return f"{name} normalises over the sequence" if any(same_size(size, sequence) for size in merged_sizes) else ""
    if target in NORMS:
        shape = argument(node, 1, "normalized_shape")
        return "" if all(isinstance(size, int) for size in shape) else f"{name} normalises over the sequence"
    if target in _ALONG_DIM:
        shape = shape_of(operand)
        rank = len(shape) + (target is aten.stack.default)
        along = [shape[dim] for dim in dims_along(node, _ALONG_DIM[target], rank) if dim < len(shape)]
        is_mixed = same_size if target in _ROW_BY_ROW else _holds
        return f"{name} works along the sequence" if any(is_mixed(size, sequence) for size in along) else ""
    if target is aten.flatten.using_ints:
        shape = shape_of(operand)
        first, last = (int(argument(node, place, name_, value)) % len(shape) for place, name_, value in _FLATTENED)
        merged_sizes = shape[first : last + 1]
        is_merged = len(merged_sizes) > 1 and any(_holds(size, sequence) for size in merged_sizes)
        return f"{name} merges the sequence with another dim" if is_merged else ""
    if target is aten.index.Tensor:
        indexed_sizes = [size for size, index in zip(shape_of(args_of(node)[0]), args_of(node)[1]) if index is not None]
        return f"{name} picks tokens" if any(_holds(size, sequence) for size in indexed_sizes) else ""
    return f"{name} may mix tokens, which a KV cache does not allow"


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
    """True for a reshape to sizes of unknown number in another order: what was one dim is taken for another."""
    orders = [[str(size.node.expr) for size in shape if symbols_of(size)] for shape in (before, after)]
    return orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
