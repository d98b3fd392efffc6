"""Gather what a program computes from positions and weights alone into a graph of its own, to be run once.

%c = cos(mul(arange(%s), %freq))       ->     tables graph:   %c for every position, [capacity, ...]
%q = mul(%x, %c)                              step graph:     %q = mul(%x, index(%table, [%positions]))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import FakeTensorMode
from kraken_compiler.errors import Rejection
from kraken_compiler.passes.graph_tools import ancestors, aten, in_order, module_path
from kraken_compiler.passes.shapes import compute_shape, is_tensor, same_size, shape_of


@dataclass
class Tables:
    """The tables graph while it is built: a copy of what the tables need, each value once.

    Attributes:
        source: The lane graph.
        tokens: Its token input, [batch, sequence].
        mode: The mode of its fake tensors.
        graph: The new graph.
        outputs: What it will return.
    """

    source: fx.Graph
    tokens: fx.Node
    mode: FakeTensorMode
    graph: fx.Graph = field(default_factory=fx.Graph)
    outputs: list[fx.Node] = field(default_factory=list)
    _new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _nodes_by_key: dict[Any, fx.Node] = field(default_factory=dict)

    def begin(self) -> None:
        """Copy the placeholders."""
        for node in self.source.nodes:
            if node.op == "placeholder":
                self._new[node] = self.graph.node_copy(node)
                self._new[node].meta = dict(node.meta)

    def add(self, node: fx.Node, rank: int) -> tuple[int, int] | Rejection:
        """Compute a token-independent tensor here.

        Args:
            node: A node of the source graph.
            rank: Number of dims it is broadcast to where it is used.

        Returns:
            The table's number among `outputs`, and the dim that held the sequence (-1 if none did, and the table is
            the tensor itself).
        """
        batch, sequence = shape_of(self.tokens)
        shape = (1,) * (rank - len(shape_of(node))) + shape_of(node)
        along = [dim for dim, size in enumerate(shape) if same_size(size, sequence)]
        dynamic_dims = [dim for dim, size in enumerate(shape) if isinstance(size, torch.SymInt)]
        table = self._copy(node)
        if not dynamic_dims:
            return self._output(table), -1
        of_batch = same_size(shape[0], batch)
        if not along and of_batch and dynamic_dims == [0]:
            return self._output(self._call(aten.slice.Tensor, table, 0, 0, 1)), -1
        first = (isinstance(shape[0], int) and shape[0] == 1) or of_batch
        if len(along) != 1 or not first or set(dynamic_dims) - {0, along[0]}:
            reason = f"it depends on positions in a way that no table holds (shape {list(map(str, shape_of(node)))})"
            return Rejection(reason, (node.name,), module_path(node))
        if len(shape_of(node)) == rank:
            table = self._call(aten.select.int, table, 0, 0)
        own = len(shape_of(table))
        dim, new_dims = along[0] - (rank - own), rank - 1 - own
        if dim:
            table = self._call(aten.movedim.int, table, dim, 0)
        for _ in range(new_dims):
            table = self._call(aten.unsqueeze.default, table, 1)
        return self._output(self._call(aten.contiguous.default, table)), along[0]

    def add_slopes(self, mask: fx.Node) -> int:
        """Compute the ALiBi slopes of a mask here, [heads]: what one step of distance adds, seen on two tokens.

        Returns:
            The table's number among `outputs`.
        """
        two = {self.tokens: self._call(aten.slice.Tensor, self._new[self.tokens], 1, 0, 2)}
        values = {node: new for node, new in self._new.items() if node.op == "placeholder"} | two
        for node in in_order(self._place(), ancestors(mask, stop=set(values))):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = self._call(node.target, *args, **kwargs)
        last = self._call(aten.select.int, values[mask], -2, 1)
        own, before = (self._call(aten.select.int, last, -1, position) for position in (1, 0))
        slopes = self._call(aten.sub.Tensor, own, before)
        # One sequence's slopes: every other dim but the heads' is 1.
        flat = self._call(aten.reshape.default, slopes, [-1])
        return self._output(self._call(aten.to.dtype, flat, torch.float32))

    def finish(self) -> fx.Graph:
        """Finish the graph and return it."""
        self.graph.output(tuple(self.outputs))
        self.graph.lint()
        return self.graph

    def _output(self, node: fx.Node) -> int:
        if node not in self.outputs:
            self.outputs.append(node)
        return self.outputs.index(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self._new:
            place = self._place()
            for other in in_order(place, ancestors(node, stop=set(self._new))):
                args, kwargs = fx.node.map_arg((other.args, other.kwargs), self._new.__getitem__)
                self._new[other] = self._call(other.target, *args, **kwargs)
        return self._new[node]

    def _place(self) -> dict[fx.Node, int]:
        return {node: place for place, node in enumerate(self.source.nodes)}

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        key = (target, _hashable(args), _hashable(kwargs))
        if key not in self._nodes_by_key:
            self._nodes_by_key[key] = compute_shape(self.graph.call_function(target, args, kwargs), self.mode)
        return self._nodes_by_key[key]


def gather(graph: fx.Graph, table: fx.Node, positions: fx.Node, along: int, rank: int, mode: FakeTensorMode) -> fx.Node:
    """Look up a table's rows for every token; the result has `rank` dims, the batch first and tokens at `along`."""
    rows = compute_shape(graph.call_function(aten.index.Tensor, (table, [positions])), mode)
    if along == 1:
        return rows
    order = [0, *range(2, along + 1), 1, *range(along + 1, rank)]
    return compute_shape(graph.call_function(aten.permute.default, (rows, order)), mode)


def used_rank(node: fx.Node, user: fx.Node) -> int:
    """Number of dims that a tensor is broadcast to by a user."""
    broadcasts = is_tensor(user) and torch.Tag.pointwise in user.target.tags  # type: ignore[union-attr]
    return len(shape_of(user if broadcasts else node))


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(element)) for key, element in value.items()))
    return (type(value).__name__, value)
