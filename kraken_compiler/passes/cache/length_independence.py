"""Proofs, by rules on operators, that what a graph computes from positions alone keeps its rows in longer sequences.

    %r = arange(%s)                       row i is i, however long the sequence is: proven
    %n = mul(%ones, %s)                   a number that is the length: not proven
    %b = sub(arange(%s), %s)              every row changes, but by the same number: no softmax over them notices

A value is *steady* if the element at every index is the same for all lengths and batch sizes that have such an index.
A value is *shifted* if it is a steady one plus something that is the same along the last dim, whatever that depends on.
What the rules do not prove may still hold: `compare_lengths` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import OpOverload
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import DEQUANTIZE, LINEAR, SHAPE_ONLY
from kraken_compiler.passes.cache.mixing import dims_along, size_groups
from kraken_compiler.passes.choosing import is_pointwise
from kraken_compiler.passes.graph_tools import ancestors, args_of, argument, aten
from kraken_compiler.passes.shapes import (
    SHAPE_ARGUMENTS,
    counts,
    is_tensor,
    is_tensor_or_tuple,
    numbers_about,
    same_size,
    shape_of,
    symbols_of,
    value_of,
)

ELEMENTS_KEPT = frozenset(
    {
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.numpy_T.default,
        aten.movedim.int,
        aten.expand.default,
        aten.expand_as.default,
        aten.broadcast_to.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.outer.default,
        aten.polar.default,
        aten.complex.default,
        aten.view_as_real.default,
        aten.view_as_complex.default,
        aten.scalar_tensor.default,
        DEQUANTIZE,
    }
)
"""Every element of the result comes from the elements at the same places, wherever a dim ends."""

RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints})
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_FILLED = SHAPE_ONLY | {
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    *RANGES,
}
_ALONG_DIM = {
    aten.cat.default: 1,
    aten.concat.default: 1,
    aten.stack.default: 1,
    aten.softmax.int: 1,
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.flip.default: 1,
    aten.cumsum.default: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.unbind.int: 1,
    aten.repeat_interleave.self_int: 2,
    aten.index_select.default: 1,
    aten.gather.default: 1,
}
"""Operators that work along a dim, and which argument says along which."""

_MATRIX_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})


class LengthIndependence:
    """Proofs about the values of one graph; earlier answers are remembered.

    Args:
        tokens: The token input, [batch, sequence].

    Attributes:
        sequence: The size of the tokens' second dim.
    """

    def __init__(self, tokens: fx.Node) -> None:
        self._tokens = tokens
        batch, self.sequence = shape_of(tokens)
        self._count_symbols = symbols_of(batch) | symbols_of(self.sequence)
        self._steady: dict[fx.Node, bool] = {tokens: False}
        self._shifted: dict[fx.Node, bool] = {}

    def is_steady(self, node: fx.Node) -> bool:
        """True if `node`'s elements are proven to be the same for all lengths and batch sizes."""
        # With a stack of its own: a long chain of operators would exceed Python's.
        todo = [node]
        while todo:
            current = todo[-1]
            operands = [one for one in current.all_input_nodes if is_tensor_or_tuple(one) and one not in self._steady]
            if current in self._steady:
                todo.pop()
            elif operands:
                todo += operands
            else:
                self._steady[current] = self._follows(current)
                todo.pop()
        return self._steady[node]

    def is_shifted(self, node: fx.Node) -> bool:
        """True if `node` is proven to be steady but for what is the same along its last dim."""
        if node not in self._shifted:
            self._shifted[node] = self.is_steady(node) or self._follows_shifted(node)
        return self._shifted[node]

    def may_differ_by_row(self, node: fx.Node) -> bool:
        """True if the numbers of a batch's rows are among what `node` is computed from."""
        batch = symbols_of(shape_of(self._tokens)[0])
        ranges = (one for one in ancestors(node) if one.target in RANGES)
        ends = (end for one in ranges if isinstance(end := _range(one)[1], fx.Node))
        return any(bool(symbols_of(end.meta["val"]) & batch) for end in ends)

    def numbers_of_tokens(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The sizes among the operands of `node` that it takes as numbers, not as the shape of something."""
        return numbers_about(node, self._count_symbols)

    def culprit(self, node: fx.Node) -> fx.Node:
        """The operator at which the proof of `node` ends: all that it reads is proven."""
        assert not self.is_steady(node)
        while True:
            unproven_operands = [
                one for one in node.all_input_nodes if self._steady.get(one) is False and one != self._tokens
            ]
            if not unproven_operands:
                return node
            node = unproven_operands[0]

    def _counts(self, operand: fx.Node) -> bool:
        """True for a size, or a number computed of sizes, that says how many tokens or rows there are."""
        return counts(operand, self._count_symbols)

    def _varies(self, node: fx.Node, dim: int) -> bool:
        shape = shape_of(node)
        return bool(shape) and bool(symbols_of(shape[dim % len(shape)]) & self._count_symbols)

    def _follows(self, node: fx.Node) -> bool:
        """True if the result is steady, given which of its operands are."""
        if node.op == "placeholder":
            return True
        target = node.target
        if target in _FILLED:
            return self._is_filled(node)
        tensors = [one for one in node.all_input_nodes if is_tensor_or_tuple(one)]
        if not all(self._steady[one] for one in tensors) or not isinstance(target, OpOverload):
            return getattr(target, "__name__", "") == "getitem" and all(self._steady[one] for one in tensors)
        if torch.Tag.nondeterministic_seeded in target.tags:
            return False
        if target is aten.slice.Tensor:
            return self._is_beginning(node)
        if target is aten.repeat.default:
            return self._is_repeated(node)
        if self.numbers_of_tokens(node):
            return False
        if target is aten.diff.default:
            return len(args_of(node)) < 5 and "append" not in node.kwargs
        if is_pointwise(target) or target in ELEMENTS_KEPT:
            return True
        if not any(self._varies(one, dim) for one in tensors if is_tensor(one) for dim in range(len(shape_of(one)))):
            return all(not self._varies(node, dim) for dim in range(len(shape_of(node)))) if is_tensor(node) else True
        return self._keeps_places(node, tensors)

    def _is_filled(self, node: fx.Node) -> bool:
        """A constant of any shape, or the numbers of the tokens from the first one on."""
        target = node.target
        if target in RANGES:
            start, _, step = _range(node)
            return not isinstance(start, fx.Node) and not isinstance(step, fx.Node)
        shapes = {one for name in SHAPE_ARGUMENTS for one in _nodes(_argument_by_name(node, name))}
        operands = set(node.all_input_nodes) - shapes
        # What only lends its shape may be anything, the token ids too.
        values = [one for one in operands if self._counts(one)]
        return not values and all(not is_tensor_or_tuple(one) or target in SHAPE_ONLY for one in operands)

    def _is_repeated(self, node: fx.Node) -> bool:
        """True if what is repeated ends at the same place at every length; how often does not matter."""
        operand, repeats = args_of(node)[:2]
        own = repeats[len(repeats) - len(shape_of(operand)) :]
        return all(count == 1 or not self._varies(operand, dim) for dim, count in enumerate(own))

    def _is_beginning(self, node: fx.Node) -> bool:
        dim, start, end, step = (argument(node, place, name) for place, name in enumerate(_SLICE, 1))
        steps = all(isinstance(number, int) for number in (dim or 0, start or 0, 1 if step is None else step))
        if not steps or (start or 0) < 0:
            return False
        # A constant table that is cut where the sequence ends, or tokens that are left out at the end or the beginning.
        return not isinstance(end, int) or end >= 0 or not self._varies(args_of(node)[0], dim or 0)

    def _keeps_places(self, node: fx.Node, tensors: Sequence[fx.Node]) -> bool:
        target, operand = node.target, tensors[0]
        if target in RESHAPES:
            return same_groups(shape_of(operand), shape_of(node))
        if target in _ALONG_DIM:
            rank = len(shape_of(operand)) + (target is aten.stack.default)
            dims = dims_along(node, _ALONG_DIM[target], rank)
            if target is aten.cumsum.default and same_size(shape_of(operand)[dims[0]], self.sequence):
                return True
            if target is aten.stack.default:
                return True
            return bool(dims) and not any(self._varies(one, dim) for one in _operands(node) for dim in dims)
        if target is aten.select.int:
            dim, place = args_of(node)[1:3]
            return isinstance(place, int) and (place >= 0 or not self._varies(operand, dim))
        if target is aten.embedding.default:
            return not self._varies(args_of(node)[0], 0)
        if target is aten.index.Tensor:
            table, indices = args_of(node)[:2]
            indexed_dims = [(dim, index) for dim, index in enumerate(indices) if index is not None]
            # A negative index counts from an end that moves.
            return all(_counts_up(index) or not self._varies(table, dim) for dim, index in indexed_dims)
        if target is LINEAR:
            return not self._varies(operand, -1)
        if target in _MATRIX_PRODUCTS:
            left, right = args_of(node)[:2]
            ranks = len(shape_of(left)) >= 2 and len(shape_of(right)) >= 2
            return ranks and not self._varies(left, -1) and not self._varies(right, -2)
        return target in (aten.tril.default, aten.triu.default)

    def _follows_shifted(self, node: fx.Node) -> bool:
        if not is_tensor(node) or node.op == "placeholder":
            return False
        shape, values = shape_of(node), args_of(node)
        if not shape or (isinstance(shape[-1], int) and shape[-1] == 1):
            return True
        target = node.target
        if target in (aten.arange.start, aten.arange.start_step):
            return len(values) < 3 or not isinstance(values[2], fx.Node)
        if target in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.add.Scalar, aten.sub.Scalar):
            return all(self.is_shifted(one) for one in node.all_input_nodes if is_tensor(one)) and not node.kwargs
        if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            return self._is_scaled(node)
        if target in (aten.neg.default, *ELEMENTS_KEPT) and target not in _MOVING:
            operand = node.all_input_nodes[0]
            # What is rounded to whole numbers is not shifted by what it was shifted by before.
            is_rounding = value_of(operand).is_floating_point() and not value_of(node).is_floating_point()
            return not is_rounding and self.is_shifted(operand)
        if target in RESHAPES:
            operand = values[0]
            same_end = bool(shape_of(operand)) and same_size(shape_of(operand)[-1], shape[-1])
            return same_end and self.is_shifted(operand)
        if target is aten.masked_fill.Scalar:
            return _hides(values[2]) and self.is_steady(values[1]) and self.is_shifted(values[0])
        if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            return self.is_steady(values[0]) and all(
                self.is_shifted(one) if isinstance(one, fx.Node) else _hides(one) for one in values[1:]
            )
        return False

    def _is_scaled(self, node: fx.Node) -> bool:
        """A shifted value times something steady that is the same along the last dim."""
        tensors = [one for one in args_of(node)[:2] if isinstance(one, fx.Node)]
        if len(tensors) < 2:
            return self.is_shifted(tensors[0])
        for shifted, factor in ((tensors[0], tensors[1]), (tensors[1], tensors[0])):
            if not is_tensor(factor) or not is_tensor(shifted):
                continue
            shape = shape_of(factor)
            same = not shape or (isinstance(shape[-1], int) and shape[-1] == 1)
            divides = node.target is aten.div.Tensor and factor is tensors[0]
            if same and not divides and self.is_steady(factor) and self.is_shifted(shifted):
                return True
        return False


_SLICE = ("dim", "start", "end", "step")
_MOVING = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.numpy_T.default,
        aten.movedim.int,
        aten.outer.default,
        aten.polar.default,
        aten.complex.default,
        aten.view_as_real.default,
        aten.view_as_complex.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        DEQUANTIZE,
    }
)
"""Operators that may put another dim last, or other elements into it."""


def _range(node: fx.Node) -> tuple[Any, Any, Any]:
    """Start, end and step of a range."""
    if node.target is aten.arange.default:
        return 0, args_of(node)[0], 1
    start, end, step = (*args_of(node), 1)[:3]
    return start, end, step


def _counts_up(node: fx.Node) -> bool:
    """True for the numbers from a first one that is not negative, in whatever shape."""
    while node.target in (*ELEMENTS_KEPT, *RESHAPES, aten.slice.Tensor, aten.add.Tensor):
        if node.target is aten.add.Tensor and not (isinstance(args_of(node)[1], int) and args_of(node)[1] >= 0):
            return False
        node = node.all_input_nodes[0]
    start, _, step = _range(node) if node.target in RANGES else (-1, 0, 0)
    return isinstance(start, int) and isinstance(step, int) and start >= 0 and step > 0


def _hides(value: Any) -> bool:
    """True for a number that stands for minus infinity in a mask."""
    return isinstance(value, (int, float)) and value <= -5e3


def _nodes(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(value, nodes.append)
    return nodes


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator works on: all of a list's, or the first."""
    first = args_of(node)[0]
    return [one for one in first if is_tensor(one)] if isinstance(first, (list, tuple)) else [first]


def _argument_by_name(node: fx.Node, name: str) -> Any:
    schema = getattr(node.target, "_schema", None)
    for place, entry in enumerate(schema.arguments if schema is not None else ()):
        if entry.name == name and place < len(args_of(node)):
            return args_of(node)[place]
    return node.kwargs.get(name)


def same_groups(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """True if both shapes have the same symbolic sizes in the same order and equal products of plain ones between."""
    if size_groups(before) == size_groups(after):
        return True
    first, second = list(before), list(after)
    while first and second and same_size(first[-1], second[-1]):
        first.pop()
        second.pop()
    # Where only the first dim varies, an element's place in memory does not depend on how long that is.
    return not any(symbols_of(size) for size in (*first[1:], *second[1:]))
