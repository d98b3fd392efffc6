"""Undo the flattening of batch and sequence around operations that treat every token alike.

    %f = reshape(%x, [-1, 32])     [b*s, 32]         ->     %y = relu(linear(%x, %w))      [b, s, 64]
    %y = relu(linear(%f, %w))      [b*s, 64]
    %r = reshape(%y, [b, s, 64])

A residual stream that is flattened on the way then stays one chain of sums. A mixture of experts flattens the experts
that a token picks too: [b*s*k, 32] becomes [b, s, k, 32].
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import EXPERT_LINEAR, LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.shapes import compute_shape, fake_mode_of, is_tensor, same_shape, same_size, shape_of

_LAST_DIM = (LINEAR, aten.layer_norm.default, aten.rms_norm.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_ALONG_DIM: dict[Any, tuple[int, str, Any]] = {
    aten.softmax.int: (1, "dim", None),
    aten.topk.default: (2, "dim", -1),
    aten.sort.default: (1, "dim", -1),
    aten.sum.dim_IntList: (1, "dim", None),
    aten.unsqueeze.default: (1, "dim", None),
    aten.split.Tensor: (2, "dim", 0),
    aten.split_with_sizes.default: (2, "dim", 0),
    aten.chunk.default: (2, "dim", 0),
    aten.slice.Tensor: (1, "dim", 0),
    aten.select.int: (1, "dim", None),
    aten.cumsum.default: (1, "dim", None),
    aten.gather.default: (1, "dim", None),
    aten.scatter.src: (1, "dim", None),
    aten.scatter.value: (1, "dim", None),
    aten.take_along_dim.default: (2, "dim", None),
}
"""Operators that work along a dim: position, name and default of the argument that says along which."""


@dataclass(frozen=True)
class _Twin:
    """The tensor `node` that was flattened: dim 0 of the flat one holds its first `leading` dims."""

    node: fx.Node
    leading: int


@dataclass(frozen=True)
class UnflattenTokens(Pass[Program]):
    name: ClassVar[str] = "unflatten-tokens"

    def run(self, program: Program) -> PassResult:
        twins: dict[fx.Node, _Twin] = {}
        matches = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten.reshape.default:
                source = args_of(node)[0]
                if source in twins and same_shape(node, twins[source].node):
                    node.replace_all_uses_with(twins[source].node)
                    program.graph.erase_node(node)
                    matches += 1
                elif source in twins and (leading := _leading_dims(twins[source].node, node)):
                    twins[node] = _Twin(twins[source].node, leading)
                elif len(shape_of(node)) == 2 and (leading := _leading_dims(source, node)) > 1:
                    twins[node] = _Twin(source, leading)
            elif any(operand in twins for operand in node.all_input_nodes):
                twin = _per_token(node, twins)
                if twin is not None:
                    twins[node] = twin
        return PassResult(matches)


def _leading_dims(source: fx.Node, node: fx.Node) -> int:
    """Number of leading dims of `source` that are dim 0 of `node`, the others as they are; 0 if they are not."""
    before, after = shape_of(source), shape_of(node)
    leading = len(before) - len(after) + 1
    if leading < 1 or not after or not all(map(same_size, before[leading:], after[1:])):
        return 0
    return leading if same_size(math.prod(before[:leading]), after[0]) else 0


def _per_token(node: fx.Node, twins: dict[fx.Node, _Twin]) -> _Twin | None:
    """The twin of `node`, if it treats every token alike."""
    operands = [operand for operand in node.all_input_nodes if is_tensor(operand)]
    flat = [operand for operand in operands if operand in twins]
    if node.target is operator.getitem:
        return _copy_unflat(node, twins, args_of(node))
    if not flat or args_of(node)[0] not in operands or not _same_tokens(flat, twins):
        return None
    source = args_of(node)[0]
    if node.target is aten.repeat_interleave.self_int:
        return _repeat(node, twins)
    if node.target in _ALONG_DIM:
        if len(flat) < len(operands):
            return None
        dims = _moved_dims(node, twins[source].leading - 1)
        return None if dims is None else _copy_unflat(node, twins, dims)
    if node.target in _LAST_DIM:
        alike = flat == [source] and len(shape_of(source)) > 1
    elif node.target is EXPERT_LINEAR:
        alike = flat == [source, args_of(node)[3]]
    else:
        # Operands that broadcast over tokens must not reach into dim 0, which the twin does not have.
        rank = len(shape_of(flat[0]))
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _CASTS
        alike = pointwise and all(
            len(shape_of(operand)) == rank if operand in twins else len(shape_of(operand)) < min(rank, 2)
            for operand in operands
        )
    return _copy_unflat(node, twins, args_of(node)) if alike else None


def _same_tokens(flat: list[fx.Node], twins: dict[fx.Node, _Twin]) -> bool:
    """True if dim 0 of all these tensors holds the same dims."""
    first = shape_of(twins[flat[0]].node)[: twins[flat[0]].leading]
    for operand in flat[1:]:
        other = shape_of(twins[operand].node)[: twins[operand].leading]
        if len(other) != len(first) or not all(map(same_size, other, first)):
            return False
    return True


def _moved_dims(node: fx.Node, shift: int) -> tuple[Any, ...] | None:
    """Arguments for a tensor that has `shift` more dims in front; None if the operator works along dim 0."""
    place, name, default = _ALONG_DIM[node.target]
    rank = len(shape_of(args_of(node)[0])) + (node.target is aten.unsqueeze.default)
    value = argument(node, place, name, default)
    if value is None:
        return None
    dims = [int(dim) % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]
    if 0 in dims or name in node.kwargs or not dims:
        return None
    args = list(args_of(node))
    new_dims = [dim + shift for dim in dims]
    args[place:] = [new_dims if isinstance(value, (list, tuple)) else new_dims[0], *args[place + 1 :]]
    return tuple(args)


def _copy_unflat(node: fx.Node, twins: dict[fx.Node, _Twin], args: tuple[Any, ...]) -> _Twin:
    """Copy an operation to the tensors before flattening."""

    def unflat(operand: fx.Node) -> fx.Node:
        return twins[operand].node if operand in twins else operand

    leading = next(twins[operand].leading for operand in node.all_input_nodes if operand in twins)
    with node.graph.inserting_after(node):
        twin = node.graph.node_copy(node, unflat)
    twin.args = fx.node.map_arg(args, unflat)
    twin.meta = {key: value for key, value in node.meta.items() if key != "val"}
    return _Twin(compute_shape(twin, fake_mode_of(node.graph)), leading)


def _repeat(node: fx.Node, twins: dict[fx.Node, _Twin]) -> _Twin | None:
    """Repeat a token several times in a row: one more dim."""
    source, times, dim = args_of(node)[0], args_of(node)[1], argument(node, 2, "dim")
    if dim != 0 or not isinstance(times, int):
        return None
    twin = twins[source]
    graph, mode = node.graph, fake_mode_of(node.graph)
    sizes = [-1] * (len(shape_of(twin.node)) + 1)
    sizes[twin.leading] = times
    with graph.inserting_before(node):
        column = compute_shape(graph.call_function(aten.unsqueeze.default, (twin.node, twin.leading)), mode)
        expansion = compute_shape(graph.call_function(aten.expand.default, (column, sizes)), mode)
    return _Twin(expansion, twin.leading + 1)
