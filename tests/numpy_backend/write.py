"""From a lane program to plain values; the one part of the backend that needs torch."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import LaneProgram
from tests.numpy_backend.graph import LaneGraph, Node
from tests.numpy_backend.operators import COLLECTIVES, OPERATORS


def graph_of(program: LaneProgram) -> LaneGraph:
    """The lane graph.

    Raises:
        UsageError: An operator is none that the interpreter has.
    """
    nodes = [
        Node(node.name, _name(node), [_plain(argument) for argument in node.args])
        for node in program.graph.nodes
        if node.op == "call_function"
    ]
    return LaneGraph(nodes, [node.name for node in program.graph.output_node().args[0]])  # type: ignore[union-attr]


def _name(node: fx.Node) -> str:
    target: Any = node.target
    name = "getitem" if target is operator.getitem else str(target._schema.name)
    given = {key: value for key, value in node.kwargs.items() if key not in ("device", "pin_memory")}
    if name not in (*OPERATORS, *COLLECTIVES) or given:
        raise UsageError(f"the numpy backend has no {name}({', '.join(given)}); compile it with another one")
    return name


def _plain(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, list | tuple):
        return [_plain(one) for one in argument]
    assert argument is None or isinstance(argument, bool | int | float | str), f"{argument} is no plain value"
    assert not isinstance(argument, torch.SymInt)
    return argument
