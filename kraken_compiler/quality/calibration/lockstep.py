"""Runs a lane program on many batches, every batch up to the same point before any goes on.

Between two points only the values that later nodes read are kept: in memory up to a limit, beyond it in files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.reference import Lanes, ReadLane, StreamingProgram
from kraken_compiler.passes.graph_tools import ancestors


class Values:
    """Values by name: tensors, lists of one tensor per lane, or plain numbers.

    Args:
        folder: An existing empty directory for what does not fit into memory.
        limit: Bytes of tensors to hold in memory.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._in_memory: dict[str, Any] = {}
        self._bytes = 0

    def put(self, name: str, value: Any) -> None:
        """Keep a value; an older one of this name is replaced."""
        self.drop(name)
        size = _size(value)
        if self._bytes + size <= self._limit:
            compact = _compact(value)
            self._in_memory[name] = Lanes(compact) if isinstance(value, Lanes) else compact
            self._bytes += size
        else:
            torch.save({"lanes": isinstance(value, Lanes), "value": _compact(value)}, self._path(name))

    def get(self, name: str) -> Any:
        """The value kept under a name."""
        if name in self._in_memory:
            return self._in_memory[name]
        content = torch.load(self._path(name), weights_only=True)
        return Lanes(content["value"]) if content["lanes"] else content["value"]

    def drop(self, name: str) -> None:
        """Forget a value, if there is one."""
        if name in self._in_memory:
            self._bytes -= _size(self._in_memory.pop(name))
        else:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.pt"


class Lockstep:
    """A lane program under way on a list of batches.

    Args:
        program: The program; it is not changed.
        read_lane: Where weights come from; asked again for every `advance`, so weights may change in between.
        batches: The program's flat inputs, one list per batch.
        values: Where values wait.
        name: Tells this run's values from those of others in the same `values`.
    """

    def __init__(
        self, program: Program, read_lane: ReadLane, batches: Sequence[list[Tensor]], values: Values, name: str
    ) -> None:
        self._program, self._read_lane, self._batches = program, read_lane, batches
        self._values, self._name = values, name
        self._placeholders = {node for node in program.graph.nodes if node.op == "placeholder"}
        self._computed_nodes: set[fx.Node] = set(self._placeholders)

    def advance(self, targets: Sequence[fx.Node]) -> Iterator[dict[fx.Node, Any]]:
        """Compute nodes on every batch, and whatever they need that is not there yet.

        Args:
            targets: The nodes to compute.

        Yields:
            For every batch in turn the targets' values: one tensor, or a list of one per lane where lanes differ.
        """
        new_nodes: set[fx.Node] = set()
        for target in targets:
            new_nodes |= ancestors(target, stop=self._computed_nodes)
        nodes = [node for node in self._program.graph.nodes if node in new_nodes]
        computed_nodes = self._computed_nodes | new_nodes
        runner = _Runner(self._program, _cached_reader(self._read_lane))
        operands = {operand for node in nodes for operand in node.all_input_nodes} - new_nodes - self._placeholders
        operands |= {target for target in targets if target not in new_nodes}
        dead = [node for node in operands if computed_nodes.issuperset(node.users)]
        live = [node for node in nodes if not computed_nodes.issuperset(node.users) or node in targets]
        for number, inputs in enumerate(self._batches):
            operand_values = {node: self._values.get(self._key(number, node)) for node in operands - self._placeholders}
            values = runner.compute(nodes, inputs, operand_values, keep={*live, *targets})
            for node in live:
                self._values.put(self._key(number, node), values[node])
            for node in dead:
                self._values.drop(self._key(number, node))
            # Whoever reads two runs side by side leaves one of them at its last value.
            self._computed_nodes = computed_nodes if number == len(self._batches) - 1 else self._computed_nodes
            yield {target: values[target] for target in targets}

    def _key(self, batch: int, node: fx.Node) -> str:
        return f"{self._name}-{batch}-{node.name}"


class _Runner(StreamingProgram):
    """Runs some nodes of a program."""

    def compute(
        self,
        nodes: Sequence[fx.Node],
        inputs: Sequence[Tensor],
        values: dict[fx.Node, Any],
        keep: Collection[fx.Node],
    ) -> dict[fx.Node, Any]:
        """The values of the nodes in `keep`, out of those that are known; others go when nothing more reads them."""
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        arguments = dict(zip(placeholders, [*self.program.weights.values(), *inputs], strict=True))
        self.env = {**arguments, **values}
        last_reader = {operand: node for node in nodes for operand in node.all_input_nodes}
        with torch.no_grad():
            for node in nodes:
                self.env[node] = self.run_node(node)
                for operand in node.all_input_nodes:
                    if last_reader[operand] is node and operand not in keep:
                        self.env.pop(operand, None)
        return self.env


def _cached_reader(read_lane: ReadLane) -> ReadLane:
    """A reader that reads every weight once."""
    tensors: dict[tuple[str, int], Tensor] = {}

    def read_once(spec: WeightSpec, lane: int) -> Tensor:
        key = (spec.name, lane if spec.shards else 0)
        if key not in tensors:
            tensors[key] = read_lane(spec, lane)
        return tensors[key]

    return read_once


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def _compact(value: Any) -> Any:
    """A copy of the value, if it is a part of a bigger tensor."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return [_compact(part) for part in value] if isinstance(value, (list, tuple)) else value
