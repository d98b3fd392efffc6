"""Shapes of graph nodes: refreshing them after a change, and giving the symbolic ones numbers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import FakeTensorMode, on_fakes

SHAPE_ARGUMENTS = frozenset({"size", "shape", "sizes"})
"""Names of the arguments in which a number only says how large something is."""


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The mode that made the graph's fake tensors."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode  # type: ignore[no-any-return]
    raise AssertionError("the graph carries no fake tensor")


def refresh_shapes(graph: fx.Graph, skip: Container[fx.Node] = ()) -> None:
    """Give every node without `meta["val"]` one by running it on its operands' fake tensors.

    Args:
        graph: The graph.
        skip: Nodes that stay without.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    shapeless_calls = [node for node in calls if "val" not in node.meta and node not in skip]
    if not shapeless_calls:
        return
    mode = fake_mode_of(graph)
    for node in shapeless_calls:
        compute_shape(node, mode)


def compute_shape(node: fx.Node, mode: FakeTensorMode) -> fx.Node:
    """Give one call its `meta["val"]` by running it on its operands' fake tensors; returns the node."""
    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    with on_fakes(mode):
        node.meta["val"] = node.target(*args, **kwargs)
    return node


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of the tensor that `node` computes."""
    return tuple(value_of(node).shape)


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that stands for what `node` computes."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node.name} does not compute one tensor"
    return value


def is_tensor(node: fx.Node) -> bool:
    """True if `node` computes one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_tensor_or_tuple(node: fx.Node) -> bool:
    """True if `node` computes tensors, and not a number."""
    return isinstance(node.meta.get("val"), (Tensor, list, tuple))


def same_size(left: Any, right: Any) -> bool:
    """True if two sizes are equal as expressions, without adding a guard."""
    return bool(_expression(left) == _expression(right))


def same_shape(left: fx.Node, right: fx.Node) -> bool:
    """True if two nodes compute tensors of equal shape, symbol by symbol."""
    left_shape, right_shape = shape_of(left), shape_of(right)
    return len(left_shape) == len(right_shape) and all(map(same_size, left_shape, right_shape))


def symbols_of(number: Any) -> frozenset[Any]:
    """The symbols in a size or in a number computed of sizes; none in a plain number."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return frozenset()
    return frozenset(number.node.expr.free_symbols)


def counts(node: fx.Node, symbols: Set[Any]) -> bool:
    """True if `node` is a size, or a number computed of sizes, in which one of the symbols is."""
    return not is_tensor_or_tuple(node) and bool(symbols_of(node.meta.get("val")) & symbols)


def numbers_about(node: fx.Node, symbols: Set[Any]) -> tuple[fx.Node, ...]:
    """The sizes about symbols among a node's operands that it takes as numbers, not as the shape of something."""
    numbers: list[fx.Node] = []
    schema = getattr(node.target, "_schema", None)
    names = [entry.name for entry in schema.arguments] if schema is not None else []
    arguments = [(names[place] if place < len(names) else "", value) for place, value in enumerate(node.args)]
    for name, value in (*arguments, *node.kwargs.items()):
        if name not in SHAPE_ARGUMENTS:
            fx.node.map_arg(value, lambda operand: numbers.append(operand) if counts(operand, symbols) else None)
    return tuple(numbers)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


class Concretizer:
    """Replaces symbolic sizes by small distinct numbers, so that a part of a graph can be run on real tensors."""

    def __init__(self, sizes: tuple[int, ...] = (2, 3, 5, 7)) -> None:
        self._free = list(sizes)
        self._symbols: dict[Any, int] = {}

    def size(self, size: Any) -> int:
        """A number for a size that may be an expression of symbols."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._symbols:
                self._symbols[symbol] = self._free.pop(0) if self._free else 11
        return int(expression.xreplace(self._symbols))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """A shape of plain numbers for what `node` computes."""
        return tuple(self.size(size) for size in shape_of(node))

    def value(self, node: fx.Node, generator: torch.Generator, constants: Mapping[str, Tensor]) -> Any:
        """A stand-in for what `node` computes: a number for a size, a random float64 tensor for a float one.

        Integer tensors get their known value or zeros, boolean ones are all true.
        """
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return self.size(value)
        if node.name in constants:
            tensor = constants[node.name]
            return tensor.double() if tensor.is_floating_point() else tensor
        shape = self.shape(node)
        if value.is_floating_point():
            return torch.randn(shape, dtype=torch.float64, generator=generator)
        return torch.full(shape, value.dtype == torch.bool, dtype=value.dtype)
