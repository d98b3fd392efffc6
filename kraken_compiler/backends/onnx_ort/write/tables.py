"""The tables that a step graph looks positions up in, computed once and stored with the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import FakeTensorMode
from kraken_compiler.ir.program import CachedProgram, Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.passes.sample_inputs import position_limit

MAX_POSITIONS = 32768
"""Positions that are stored for a model whose positions do not end."""


class LaneTables:
    """The tables of all lanes; those of one lane are computed when they are asked for.

    Attributes:
        positions: How many positions they hold; None if nothing depends on positions.
        shapes: Shape of every table, the same on all lanes.
    """

    def __init__(
        self, program: Program, cached: CachedProgram, read: SourceReader, used_names: Collection[str]
    ) -> None:
        """Determine the number of positions.

        Args:
            program: The lane program.
            cached: Its program with a KV cache.
            read: Gives a whole source tensor by name, the program's own constants too.
            used_names: Names of the tables that are used.
        """
        self._graph = cached.tables.module
        self._weights = cached.tables.weights
        self._names = cached.plan.tables
        self._read, self._used_names = read, frozenset(used_names)
        limit = min(cached.plan.limit or MAX_POSITIONS, position_limit(program), MAX_POSITIONS)
        weights = self._lane_weights(0)
        self._length, values = _reach(self._graph, weights, limit)
        pairs = zip(_shapes(self._graph, weights, 2), values, strict=True)
        depends = any(shape != tuple(value.shape) for shape, value in pairs)
        self.positions = self._length if depends else cached.plan.limit
        self._first: dict[str, Tensor] | None = self._by_name(values)
        self.shapes = {name: tuple(value.shape) for name, value in self._first.items()}

    def of(self, lane: int) -> dict[str, Tensor]:
        """A lane's tables by name; each call computes them, but for the first one of lane 0's."""
        first, self._first = self._first, None
        if lane == 0 and first is not None:
            return first
        return self._by_name(_run(self._graph, self._lane_weights(lane), self._length))

    def _by_name(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in zip(self._names, values) if name in self._used_names}

    def _lane_weights(self, lane: int) -> list[Tensor]:
        placeholders = [node for node in self._graph.graph.nodes if node.op == "placeholder"]
        read_names = {node.name for node in placeholders if node.users}
        return [
            spec.take(self._read(spec.source), lane).to(spec.torch_dtype) if name in read_names else torch.empty(0)
            for name, spec in self._weights.items()
        ]


def transposed_weights(cached: CachedProgram) -> dict[str, str]:
    """The tables that are weights transposed and nothing else: name of the table -> name of the weight."""
    transposes = {}
    for name, node in zip(cached.plan.tables, cached.tables.graph.output_node().args[0]):  # type: ignore[arg-type]
        if isinstance(node, fx.Node) and node.target is torch.ops.aten.permute.default:
            operand, order = node.args
            if isinstance(operand, fx.Node) and operand.name in cached.tables.weights and order == [1, 0]:
                transposes[name] = operand.name
    return transposes


def _run(graph: fx.GraphModule, weights: list[Tensor], positions: int) -> tuple[Tensor, ...]:
    with torch.no_grad():
        values: tuple[Tensor, ...] = graph(*weights, torch.zeros(1, positions, dtype=torch.int64))
    return values


def _shapes(graph: fx.GraphModule, weights: list[Tensor], positions: int) -> list[tuple[int, ...]]:
    """The shapes of what `_run` would compute. Those in the graph are symbols, also where they do not vary."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return [tuple(value.shape) for value in _run(graph, [mode.from_tensor(one) for one in weights], positions)]


def _reach(graph: fx.GraphModule, weights: list[Tensor], limit: int) -> tuple[int, tuple[Tensor, ...]]:
    """The most positions that the tables can be computed for, and the tables.

    Stored ones end somewhere, which only running shows.
    """
    low, high = 1, limit + 1
    positions = limit
    values: tuple[Tensor, ...] = ()
    while high - low > 1:
        try:
            values = _run(graph, weights, positions)
            low = positions
        except (IndexError, RuntimeError):
            high = positions
        positions = (low + high) // 2
    return low, values
