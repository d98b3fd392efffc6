"""Small queries and changes of a graph that many passes need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ops.dequantize import grain
from kraken_compiler.ops.op_sets import SHAPE_ONLY

aten = torch.ops.aten


def module_path(node: fx.Node) -> str:
    """Path of the module whose `forward` made `node`, as the source model spells it; "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]).removeprefix("L['self'].").removeprefix("L['self']") if paths else ""


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """The graph's calls of `targets`, in order, safe against erasing while looping."""
    return iter([node for node in graph.nodes if node.op == "call_function" and node.target in targets])


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments, without the type of everything that an argument may be."""
    return node.args


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by name."""
    if len(args_of(node)) > position:
        return args_of(node)[position]
    return node.kwargs.get(name, default)


def descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on `roots`, the roots included."""
    seen = set(roots)
    todo = list(seen)
    while todo:
        for user in todo.pop().users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def value_descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on `roots`, the roots included; one that only reads a root's shape does not."""
    nodes = set(roots)
    return nodes | descendants(user for root in nodes for user in root.users if user.target not in SHAPE_ONLY)


def ancestors(
    node: fx.Node,
    stop: Set[fx.Node] = frozenset(),
    within: Set[fx.Node] | None = None,
) -> set[fx.Node]:
    """All nodes that `node` depends on, itself included.

    Args:
        node: Where to begin.
        stop: Not gone past; its members are left out.
        within: If given, nothing outside it is looked at.
    """
    seen = {node} - stop
    todo = list(seen)
    while todo:
        for operand in todo.pop().all_input_nodes:
            if operand not in seen and operand not in stop and (within is None or operand in within):
                seen.add(operand)
                todo.append(operand)
    return seen


def in_order(place: Mapping[fx.Node, int], nodes: set[fx.Node]) -> list[fx.Node]:
    """`nodes` in graph order, given every node's place in it."""
    return sorted(nodes, key=place.__getitem__)


def grain_of(weight: fx.Node) -> int:
    """Number of columns of a dequantised weight that stay together when it is cut."""
    scale, bits = args_of(weight)[1], args_of(weight)[3]
    return grain(weight.meta["val"].shape[-1], scale.meta["val"].shape[-1], bits)


def value_ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes whose values `node` depends on, itself included; not those of which only the shape is read."""
    seen, todo = {node}, [node]
    while todo:
        reader = todo.pop()
        if reader.target in SHAPE_ONLY:
            continue
        todo += [operand for operand in reader.all_input_nodes if operand not in seen]
        seen.update(reader.all_input_nodes)
    return seen


def near_miss(reason: str, node: fx.Node) -> Rejection:
    """The reason for which a matcher that expected something else at `node` does not fire."""
    return Rejection(reason, (node.name,), module_path(node))


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let every user of `node` read `new` instead, and remove `node`."""
    if "val" in node.meta and "val" not in new.meta:
        new.meta["val"] = node.meta["val"]
    new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
