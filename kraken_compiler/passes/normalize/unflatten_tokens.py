"""Undo the flattening of batch and sequence around operations that treat every token alike.

    %f = reshape(%x, [-1, 32])     [b*s, 32]         ->     %y = relu(linear(%x, %w))      [b, s, 64]
    %y = relu(linear(%f, %w))      [b*s, 64]
    %r = reshape(%y, [b, s, 64])

A residual stream that is flattened on the way then stays one chain of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.base import Pass, PassResult
from kraken_compiler.passes.graph_tools import LINEAR, args_of, aten
from kraken_compiler.passes.shapes import is_tensor, same_shape, same_size, shape_of

_LAST_DIM = (LINEAR, aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class UnflattenTokens(Pass):
    name: ClassVar[str] = "unflatten-tokens"

    def run(self, program: Program) -> PassResult:
        twins: dict[fx.Node, fx.Node] = {}
        matches = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function" or not is_tensor(node):
                continue
            if node.target is aten.reshape.default:
                source = args_of(node)[0]
                if source in twins and same_shape(node, twins[source]):
                    node.replace_all_uses_with(twins[source])
                    program.graph.erase_node(node)
                    matches += 1
                elif _flattens(source, node):
                    twins[node] = source
            elif any(operand in twins for operand in node.all_input_nodes) and _is_per_token(node, twins):
                twins[node] = _unflattened(node, twins)
        return PassResult(matches)


def _flattens(source: fx.Node, node: fx.Node) -> bool:
    """[b, s, d] -> [b*s, d]"""
    before, after = shape_of(source), shape_of(node)
    return len(before) > len(after) == 2 and same_size(before[-1], after[-1])


def _is_per_token(node: fx.Node, twins: dict[fx.Node, fx.Node]) -> bool:
    operands = [operand for operand in node.all_input_nodes if is_tensor(operand)]
    flat = [operand for operand in operands if operand in twins]
    leading = shape_of(twins[flat[0]])[:-1]
    for operand in flat[1:]:
        other = shape_of(twins[operand])[:-1]
        if len(other) != len(leading) or not all(map(same_size, other, leading)):
            return False
    rest = [operand for operand in operands if operand not in twins]
    if node.target in _LAST_DIM:
        return args_of(node)[0] in twins and len(flat) == 1
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and all(len(shape_of(operand)) <= 1 for operand in rest)


def _unflattened(node: fx.Node, twins: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same operation on the tensors before flattening."""
    with node.graph.inserting_after(node):
        twin = node.graph.node_copy(node, lambda operand: twins.get(operand, operand))
    source = next(operand for operand in node.all_input_nodes if operand in twins)
    flat = node.meta["val"]
    twin.meta = dict(node.meta)
    twin.meta["val"] = flat.new_empty((*shape_of(twins[source])[:-1], flat.shape[-1]))
    return twin
