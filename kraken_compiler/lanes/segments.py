"""Cut a lane graph at its collectives: what lies between two of them is a segment that one lane runs by itself.

A segment can be batched over the lanes, or be computed again in the backward pass instead of keeping what is inside it,
and no collective is then called twice.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from kraken_compiler import _torch_compat as compat
from kraken_compiler.lanes.batched_ops import BATCHED_AS
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)

Kind = Literal["start", "wait", "gather"]

_KINDS: dict[Any, Kind] = {
    torch.ops.kraken.all_reduce_start.default: "start",
    torch.ops.kraken.wait.default: "wait",
    torch.ops.kraken.all_gather.default: "gather",
}
_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


@dataclass(frozen=True)
class Segment:
    """A part of a lane graph without collectives.

    Attributes:
        module: Its graph; the placeholders are `inputs`, the output is the tuple of `outputs`.
        inputs: Names of the values it reads: weights, inputs of the model, other steps' values.
        outputs: Names of the values that others read.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Collective:
    """A call of a collective.

    Attributes:
        kind: Which one.
        name: Name of its value.
        operand: Name of what it is given.
        dim: Along which parts are gathered.
    """

    kind: Kind
    name: str
    operand: str
    dim: int = 0


Step = Segment | Collective


def cut(graph: fx.Graph) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """Cut a lane graph.

    Args:
        graph: A lane graph; it is not changed.

    Returns:
        The steps in the order of the graph, and the names of the graph's outputs.
    """
    groups = _groups(graph)
    (output,) = next(node for node in graph.nodes if node.op == "output").args
    assert isinstance(output, list | tuple)
    outputs = tuple(node.name for node in output if isinstance(node, fx.Node))
    inputs = [_inputs(group) if isinstance(group, list) else group.all_input_nodes for group in groups]
    read_names = {node.name for nodes in inputs for node in nodes} | set(outputs)
    steps = [
        _segment(group, nodes, read_names) if isinstance(group, list) else _collective(group)
        for group, nodes in zip(groups, inputs, strict=True)
    ]
    return tuple(steps), outputs


def is_size(node: fx.Node) -> bool:
    """True if a node's value is a number that follows from sizes: every segment that needs it computes it itself."""
    if node.target in _SIZES:
        return True
    plain = callable(node.target) and not isinstance(node.target, compat.OpOverload)
    is_computed = plain and node.target is not operator.getitem and bool(node.all_input_nodes)
    return is_computed and all(map(is_size, node.all_input_nodes))


def _groups(graph: fx.Graph) -> list[list[fx.Node] | fx.Node]:
    """The graph's calls: lists of those between collectives, and the collectives."""
    groups: list[list[fx.Node] | fx.Node] = []
    group_of: dict[fx.Node, list[fx.Node]] = {}
    current: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or is_size(node):
            continue
        if node.target in _KINDS:
            groups += [current, node]
            current = []
            continue
        # What a call with several results gives leaves its segment as single values.
        group = group_of[node.args[0]] if node.target is operator.getitem and node.args[0] in group_of else current
        group.append(node)
        group_of[node] = group
    return [group for group in [*groups, current] if group != []]


def _inputs(group: list[fx.Node]) -> list[fx.Node]:
    """The values that a segment reads from outside, sizes looked through."""
    inside = set(group)
    inputs: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in inside:
                continue
            if is_size(operand):
                visit(operand)
            else:
                inputs[operand] = None

    for node in group:
        visit(node)
    return list(inputs)


def _segment(group: list[fx.Node], inputs: list[fx.Node], read_names: set[str]) -> Segment:
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in inputs}

    def copy(node: fx.Node) -> fx.Node:
        if node not in values:
            for operand in node.all_input_nodes:
                copy(operand)
            duplicate = graph.node_copy(node, values.__getitem__)
            duplicate.target = BATCHED_AS.get(node.target, node.target)
            duplicate.meta = {}
            values[node] = duplicate
        return values[node]

    outputs = [node for node in group if node.name in read_names]
    for node in group:
        copy(node)
    graph.output(tuple(values[node] for node in outputs))
    module = fx.GraphModule({}, graph)
    return Segment(module, tuple(node.name for node in inputs), tuple(node.name for node in outputs))


def _collective(node: fx.Node) -> Collective:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    kind = _KINDS[node.target]
    dim = node.args[1] if kind == "gather" else 0
    assert isinstance(dim, int)
    return Collective(kind, node.name, operand.name, dim)


def nodes_of(segment: Segment) -> Iterator[fx.Node]:
    """The calls of a segment, in order."""
    return (node for node in segment.module.graph.nodes if node.op == "call_function")
