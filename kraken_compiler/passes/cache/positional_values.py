"""Numbers that a graph computes from positions alone: run the few nodes that a mask or a position index depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.graph_tools import ancestors, in_order
from kraken_compiler.passes.shapes import value_of


def origins(program: Program, node: fx.Node) -> list[fx.Node]:
    """Everything that `node` is computed from, itself included, in graph order."""
    return in_order({other: place for place, other in enumerate(program.graph.nodes)}, ancestors(node))


def constant_of(program: Program, node: fx.Node) -> Tensor | None:
    """The whole value of a placeholder that is no checkpoint's; None for anything else."""
    spec = program.weights.get(node.name) if node.op == "placeholder" else None
    return program.constants.get(spec.source) if spec is not None else None


def stored_weights(program: Program, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The weights among `nodes` whose values are not at hand."""
    return [node for node in nodes if node.name in program.weights and constant_of(program, node) is None]


def draws(program: Program, nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Lane and seed of the evaluations that together stand for all lanes and all values of the weights.

    Weights have no values yet: what holds for two random draws holds for any.
    """
    specs = [program.weights[node.name] for node in nodes if node.name in program.weights]
    lanes = program.degree if any(spec.shards for spec in specs) else 1
    return [(lane, seed) for lane in range(lanes) for seed in range(1 + bool(stored_weights(program, nodes)))]


def evaluate(
    program: Program, nodes: Sequence[fx.Node], length: int, lane: int, seed: int = 0, batch: int = 1
) -> Tensor:
    """The value of the last of `nodes` on one lane.

    Args:
        program: A lane program whose only input is its tokens.
        nodes: What `origins` gave.
        length: Number of tokens; which tokens they are does not matter, they are all 0.
        lane: Number of the lane.
        seed: Weights have no values yet; they get random ones.
        batch: Number of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            spec = program.weights.get(node.name)
            tokens = torch.zeros(batch, length, dtype=value_of(node).dtype)
            values[node] = tokens if spec is None else _weight(program, node, lane, generator)
        else:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    result = values[nodes[-1]]
    assert isinstance(result, Tensor)
    return result


def _weight(program: Program, node: fx.Node, lane: int, generator: torch.Generator) -> Tensor:
    spec, constant = program.weights[node.name], constant_of(program, node)
    if constant is not None:
        return spec.take(constant, lane)
    return torch.rand(spec.shape, generator=generator).to(spec.torch_dtype)
