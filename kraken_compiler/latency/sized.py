"""Shapes of a graph's values for sizes that are numbers.

A graph's own shapes are symbolic, and one that was read from a file has none. Operators are asked once for every
combination of operands: the layers of a model are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import FakeTensorMode, on_fakes

aten = torch.ops.aten


@dataclass(frozen=True)
class Sized:
    """What is known of a tensor.

    Attributes:
        shape: Its sizes.
        dtype: Its element type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many it has."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return self.numbers * self.dtype.itemsize


class Sizer:
    """Finds the shapes of graphs, and remembers what operators make of theirs."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def sizes(self, graph: fx.Graph, placeholders: Mapping[str, Sized]) -> dict[fx.Node, Any]:
        """The shapes of all values.

        Args:
            graph: A graph; whether its nodes carry `meta["val"]` does not matter.
            placeholders: What it is given, by name.

        Returns:
            A `Sized` for every node that computes a tensor, tuples of them, and plain numbers.
        """
        found: dict[fx.Node, Any] = {}
        with on_fakes(FakeTensorMode(allow_non_fake_inputs=True)):
            for node in graph.nodes:
                if node.op == "placeholder":
                    found[node] = placeholders[node.name]
                elif node.op == "call_function":
                    found[node] = self._call(node, found)
        return found

    def _call(self, node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        key = (node.target, _key(args), _key(kwargs))
        if key not in self._known:
            fake_args, fake_kwargs = _mapped((args, kwargs), _fake)
            assert callable(node.target)
            # Operands are made anew, and so without the strides that let a view be one.
            target = aten.reshape.default if node.target is aten.view.default else node.target
            self._known[key] = _mapped(target(*fake_args, **fake_kwargs), _sized)
        return self._known[key]


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    return (type(value), value)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return change(value)


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Sized) else value


def _sized(value: Any) -> Any:
    return Sized(tuple(map(int, value.shape)), value.dtype) if isinstance(value, Tensor) else value
