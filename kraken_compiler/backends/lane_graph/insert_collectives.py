"""Puts real collectives where a lane graph has `kraken::` ops, at the very same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import functional_collectives
from kraken_compiler.ops import collectives as ops
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.group import GroupCommunicator

Replace = Callable[[fx.Graph, fx.Node], fx.Node]


def bind_collectives(module: fx.GraphModule, communicator: Communicator) -> fx.GraphModule:
    """Replace every `kraken::` collective by a communicator's, in place.

    A process group's collectives become functional collectives, which compilers understand. Of any other
    communicator the graph calls the methods.

    Returns:
        `module`, recompiled.
    """
    if isinstance(communicator, GroupCommunicator):
        return with_real_collectives(
            module, communicator.group_name, communicator.degree, reduce_dtype=communicator.reduce_dtype
        )

    def start(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(communicator.start, (node.args[0],))

    def wait(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(communicator.wait, (node.args[0],))

    def gather(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(communicator.all_gather, node.args[:2])

    return replace_collectives(module, start, wait, gather)


def with_real_collectives(
    module: fx.GraphModule, group_name: str, degree: int, *, reduce_dtype: torch.dtype | None = None
) -> fx.GraphModule:
    """Replace every `kraken::` collective by the functional collective of a group, in place.

    A reduce really starts at the node that stood for its start, and is awaited at the node that stood for its wait.

    Args:
        module: A lane graph.
        group_name: The process group's name, as functional collectives take it.
        degree: Number of ranks in the group.
        reduce_dtype: To which parts are rounded before they are sent; None leaves them.

    Returns:
        `module`, recompiled.
    """
    real = functional_collectives()
    aten = torch.ops.aten

    def start(graph: fx.Graph, node: fx.Node) -> fx.Node:
        part = node.args[0]
        if reduce_dtype is not None:
            part = graph.call_function(aten.to.dtype, (part, reduce_dtype))
        return graph.call_function(real.all_reduce.default, (part, "sum", group_name))

    def wait(graph: fx.Graph, node: fx.Node) -> fx.Node:
        handle = node.args[0]
        total = graph.call_function(real.wait_tensor.default, (handle,))
        if reduce_dtype is None:
            return total
        assert isinstance(handle, fx.Node)
        rounded_part = handle.args[0]
        assert isinstance(rounded_part, fx.Node)
        return graph.call_function(aten.type_as.default, (total, rounded_part.args[0]))

    def gather(graph: fx.Graph, node: fx.Node) -> fx.Node:
        part, dim, _ = node.args
        whole = graph.call_function(aten.contiguous.default, (part,))
        gathering = graph.call_function(real.all_gather_into_tensor.default, (whole, degree, group_name))
        concatenation = graph.call_function(real.wait_tensor.default, (gathering,))
        # Ranks are gathered along the first dim, whatever dim the lanes' parts belong to.
        parts = graph.call_function(aten.chunk.default, (concatenation, degree))
        return graph.call_function(aten.cat.default, (parts, dim))

    return replace_collectives(module, start, wait, gather)


def replace_collectives(module: fx.GraphModule, start: Replace, wait: Replace, gather: Replace) -> fx.GraphModule:
    """Replace every `kraken::` collective by what the functions insert; each is given the node it replaces.

    Args:
        module: A lane graph; it is changed. A wait's handle is the node that replaced its start.
        start, wait, gather: Insert nodes at the graph's insertion point and return the one with the result.

    Returns:
        `module`, recompiled.
    """
    assert ops is not None  # importing it defines the kraken ops
    kraken: Any = torch.ops.kraken
    replacements: dict[Any, Replace] = {
        kraken.all_reduce_start.default: start,
        kraken.wait.default: wait,
        kraken.all_gather.default: gather,
    }
    graph = module.graph
    for node in list(graph.nodes):
        replacement = replacements.get(node.target)
        if replacement is None:
            continue
        with graph.inserting_before(node):
            new_node = replacement(graph, node)
        new_node.meta = dict(node.meta)
        node.replace_all_uses_with(new_node)
        graph.erase_node(node)
    module.recompile()
    return module


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes and metadata."""
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, values)
    copy.output(result)
    for source, target in values.items():
        target.meta = dict(source.meta)
    return copy
