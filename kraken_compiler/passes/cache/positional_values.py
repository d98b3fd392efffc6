"""Numbers that a graph computes from positions alone: run the few nodes that a mask or a position index depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.graph_tools import ancestors, in_order


def origins(program: Program, node: fx.Node) -> list[fx.Node]:
    """Everything that `node` is computed from, itself included, in graph order."""
    return in_order({other: place for place, other in enumerate(program.graph.nodes)}, ancestors(node))


def constant_of(program: Program, node: fx.Node) -> Tensor | None:
    """The whole value of a placeholder that is no checkpoint's; None for anything else."""
    spec = program.weights.get(node.name) if node.op == "placeholder" else None
    return program.constants.get(spec.source) if spec is not None else None


def evaluate(program: Program, nodes: Sequence[fx.Node], length: int, lane: int, seed: int = 0) -> Tensor:
    """The value of the last of `nodes` on one lane.

    Args:
        program: A lane program whose only input is its tokens.
        nodes: What `origins` gave.
        length: Number of tokens; which tokens they are does not matter, they are all 0.
        lane: Number of the lane.
        seed: Weights have no values yet; they get random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(program, node, length, lane, generator)
        else:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    result = values[nodes[-1]]
    assert isinstance(result, Tensor)
    return result


def _placeholder(program: Program, node: fx.Node, length: int, lane: int, generator: torch.Generator) -> Tensor:
    spec = program.weights.get(node.name)
    if spec is None:
        return torch.zeros(1, length, dtype=torch.int64)
    constant = constant_of(program, node)
    if constant is not None:
        return spec.take(constant, lane)
    return torch.rand(spec.shape, generator=generator).to(spec.torch_dtype)
