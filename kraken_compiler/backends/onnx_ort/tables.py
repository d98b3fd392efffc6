"""The tables that a step graph looks positions up in, computed once and stored with the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import CachedProgram, Program
from kraken_compiler.ir.sample_inputs import position_limit

MAX_POSITIONS = 32768
"""Positions that are stored for a model whose positions do not end."""


@dataclass(frozen=True)
class LaneTables:
    """The tables of all lanes.

    Attributes:
        values: For every lane, tables by name.
        positions: How many positions they hold; None if nothing depends on positions.
    """

    values: list[dict[str, Tensor]]
    positions: int | None


def lane_tables(
    program: Program, cached: CachedProgram, read: Callable[[str], Tensor], wanted: Collection[str]
) -> LaneTables:
    """Compute every lane's tables.

    Args:
        program: The lane program.
        cached: Its program with a KV cache.
        read: Gives a whole source tensor by name, the program's own constants too.
        wanted: Names of the tables that are used.
    """
    graph = cached.tables.module
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    read_ones = {node.name for node in placeholders if node.users}
    names = cached.plan.tables
    lanes = []
    positions: int | None = None
    for lane in range(program.degree):
        weights = [
            spec.take(read(spec.source), lane).to(spec.torch_dtype) if name in read_ones else torch.empty(0)
            for name, spec in cached.tables.weights.items()
        ]
        if positions is None:
            limit = min(cached.plan.limit or MAX_POSITIONS, position_limit(program), MAX_POSITIONS)
            positions = _reach(graph, weights, limit)
        computed = _run(graph, weights, positions)
        lanes.append({name: value.contiguous() for name, value in zip(names, computed) if name in wanted})
    depends = any(value.shape[0] != other.shape[0] for value, other in zip(_run(graph, weights, 1), computed))
    return LaneTables(lanes, positions if depends else cached.plan.limit)


def _run(graph: fx.GraphModule, weights: list[Tensor], positions: int) -> tuple[Tensor, ...]:
    with torch.no_grad():
        values: tuple[Tensor, ...] = graph(*weights, torch.zeros(1, positions, dtype=torch.int64))
    return values


def _reach(graph: fx.GraphModule, weights: list[Tensor], limit: int) -> int:
    """The most positions that the tables can be computed for. Stored ones end somewhere, which only running shows."""
    low, high = 1, limit + 1
    tried = limit
    while high - low > 1:
        try:
            _run(graph, weights, tried)
            low = tried
        except (IndexError, RuntimeError):
            high = tried
        tried = (low + high) // 2
    return low
