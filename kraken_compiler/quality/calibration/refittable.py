"""The weights of a branch that calibration may refit: those of its input and of its output projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ops.op_sets import DEQUANTIZE, LINEAR
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.projections import find_projections


@dataclass(frozen=True)
class Projection:
    """A linear of the lane graph whose weight belongs to it alone.

    Attributes:
        node: The linear.
        weight: Its weight's row of the weight table.
        views: The permutes and reshapes between the stored weight and the linear's [out, in], in graph order.
        bias: Its bias's row, None if it has none.
        owns_bias: True if it has a bias that nothing else reads.
    """

    node: fx.Node
    weight: WeightSpec
    views: tuple[fx.Node, ...] = ()
    bias: WeightSpec | None = None
    owns_bias: bool = False

    @property
    def input(self) -> fx.Node:
        """The operand that the weight multiplies."""
        operand = args_of(self.node)[0]
        assert isinstance(operand, fx.Node)
        return operand

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the layout in which the weight is stored."""
        for view in reversed(self.views):
            if view.target is aten.permute.default:
                matrix = matrix.permute(torch.tensor(args_of(view)[1]).argsort().tolist())
            else:
                matrix = matrix.reshape(_shape(args_of(view)[0]))
        return matrix

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight as the linear reads it, [out, in]."""
        for view in self.views:
            dims = args_of(view)[1]
            weight = weight.permute(dims) if view.target is aten.permute.default else weight.reshape(dims)
        return weight


@dataclass(frozen=True)
class Refittable:
    """The projections of one branch.

    Attributes:
        branch: The branch.
        inputs: Its input projections, grouped by what they read: one group for q, k and v of one norm.
        output: Its output projection.
        end: What it adds to the stream.
    """

    branch: Branch
    inputs: tuple[tuple[Projection, ...], ...]
    output: Projection
    end: fx.Node


def find_refittable(program: LaneProgram) -> list[Refittable | Rejection]:
    """Find the projections of every branch, in order, that may be refitted, or why there are none."""
    weights = weight_derived(program)
    nodes = {node.name: node for node in program.graph.nodes}
    owners: dict[str, int] = {}
    for branch in program.layers.branches:
        for name in branch.nodes:
            owners[name] = owners.get(name, 0) + 1
    return [_of_branch(branch, program, nodes, weights, owners) for branch in program.layers.branches]


def _of_branch(
    branch: Branch, program: LaneProgram, nodes: dict[str, fx.Node], weights: set[fx.Node], owners: dict[str, int]
) -> Refittable | Rejection:
    inside = [nodes[name] for name in branch.nodes]
    projections = find_projections(nodes[branch.output], inside, weights)
    if isinstance(projections, Rejection):
        return projections
    groups: dict[Any, list[Projection]] = {}
    for node in (*projections.inputs, projections.output):
        projection = _projection(node, program)
        if isinstance(projection, Rejection):
            return projection
        if owners[node.name] > 1:
            return Rejection("a projection serves two branches at once", (node.name,), branch.path)
        if node is projections.output:
            groups[None] = [projection]
        elif projection.weight.shards:  # What all lanes hold alike (the one key head of multi-query) stays so.
            groups.setdefault(projection.input, []).append(projection)
    (output,) = groups.pop(None)
    return Refittable(branch, tuple(tuple(group) for group in groups.values()), output, nodes[branch.output])


def _projection(node: fx.Node, program: LaneProgram) -> Projection | Rejection:
    if node.target is not LINEAR:
        return Rejection("its projections are those of experts, each of which sees only some tokens", (node.name,))
    weight, bias = args_of(node)[1], argument(node, 2, "bias")
    views: list[fx.Node] = []
    user = node
    while weight.op != "placeholder":
        if weight.target is DEQUANTIZE:
            return Rejection("its weight is quantised: what fits better would be rounded again", (node.name,))
        if weight.target not in (aten.permute.default, aten.reshape.default) or len(weight.users) > 1:
            return Rejection("its weight is computed from other weights", (node.name,))
        views.insert(0, weight)
        user, weight = weight, args_of(weight)[0]
    row = program.weights[weight.name]
    if set(weight.users) != {user}:
        return Rejection("its weight is shared with another part of the model", (node.name,))
    if bias is not None and bias.op != "placeholder":
        return Rejection("its bias is computed from other weights", (node.name,))
    bias_row = program.weights[bias.name] if bias is not None else None
    owns_bias = bias is not None and set(bias.users) == {node}
    return Projection(node, row, tuple(views), bias_row, owns_bias)


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)
