"""Remove what computes nothing: asserts, copies, casts to the same dtype, slices of everything, dropout in eval mode.

%c = clone(%x)                                   ->     (users of %c read %x)
%s = slice(%c, 0, 0, 9223372036854775807)
_assert_tensor_metadata(%s, ...)
%t = concatenate([%x, %y], -1)                   ->     %t = cat([%x, %y], -1)
%w = type_as(%v, %x)                             ->     %w = to(%v, float32)        (what it reads is %v alone)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, replace
from kraken_compiler.passes.shapes import is_tensor, same_shape, same_size, shape_of, value_of

_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
_COPIES = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
    }
)
_CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten.type_as.default,
        aten._to_copy.default,
    }
)
_CASTS_LIKE = frozenset({aten.type_as.default, aten.to.other})
_RESIZES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor}
)


@dataclass(frozen=True)
class DropNoops(Pass[Program]):
    name: ClassVar[str] = "drop-noops"

    def run(self, program: Program) -> PassResult:
        matches = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTS:
                program.graph.erase_node(node)
                matches += 1
                continue
            if node.target in (aten.concat.default, aten.concatenate.default):
                node.target = aten.cat.default
                matches += 1
            if node.target is aten.cat.default and _drop_empty_operands(node):
                matches += 1
            elif _computes_its_first_operand(node):
                node.replace_all_uses_with(args_of(node)[0])
                program.graph.erase_node(node)
                matches += 1
            elif node.target in _CASTS_LIKE and value_of(node).device == value_of(args_of(node)[0]).device:
                node.target, node.args, node.kwargs = aten.to.dtype, (args_of(node)[0], value_of(node).dtype), {}
                matches += 1
        return PassResult(matches)


def _computes_its_first_operand(node: fx.Node) -> bool:
    operand = args_of(node)[0] if node.args else None
    if not isinstance(operand, fx.Node) or not is_tensor(node) or not is_tensor(operand):
        return False
    if node.target in _COPIES:
        return True
    if node.target in _CASTS:
        return value_of(node).dtype == value_of(operand).dtype
    if node.target in _RESIZES:
        # A full slice may step backwards in no model we can capture, so equal shape means equal value.
        return same_shape(node, operand)
    if node.target is aten.dropout.default:
        return argument(node, 2, "train", False) is False or argument(node, 1, "p", 0.0) == 0.0
    if node.target is aten.add.Tensor:
        return _is_number(args_of(node)[1], 0) and value_of(node).dtype == value_of(operand).dtype
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _is_number(args_of(node)[1], 1) and value_of(node).dtype == value_of(operand).dtype
    return False


def _drop_empty_operands(node: fx.Node) -> bool:
    """cat([%x, <no elements>]) is %x: partial rotary embeddings that rotate everything concatenate nothing.

    torch also lets an empty tensor of one dim stand among tensors of any shape: caches that hold nothing yet.
    """
    tensors, dim, rank = args_of(node)[0], int(argument(node, 1, "dim", 0)), len(shape_of(node))
    same_rank = [tensor for tensor in tensors if len(shape_of(tensor)) == rank]
    full = [tensor for tensor in same_rank if not same_size(shape_of(tensor)[dim], 0)] or same_rank[:1]
    if len(full) == len(tensors):
        return False
    with node.graph.inserting_before(node):
        new = full[0] if len(full) == 1 else node.graph.call_function(aten.cat.default, (full, dim))
        # An empty tensor has a say in the element type.
        dtype = functools.reduce(torch.promote_types, (value_of(tensor).dtype for tensor in full))
        if dtype != value_of(node).dtype:
            new = node.graph.call_function(aten.to.dtype, (new, value_of(node).dtype))
    if new in full:
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
    else:
        replace(node, new)
    return True


def _is_number(value: object, number: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, torch.SymInt) and value == number
