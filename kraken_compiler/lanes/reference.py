"""Runs a program of any size in little memory: node by node, each weight read when it is needed and dropped after.

It is the reference that everything else is checked against: no vmap, no compiler, no process group; a value that
differs between lanes is a list of one tensor per lane, and a reduce is a sum over that list.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.weights.io.safetensors_format import read_header, read_tensor
from kraken_compiler.weights.lane_tensors import ReadLane as ReadLane


def read_from_source(program: Program, read: SourceReader) -> ReadLane:
    """Local tensors cut out of the source's tensors; the last source tensor is kept for the next lane."""
    read = program.reader(read)
    last: dict[str, Tensor] = {}

    def read_lane(spec: WeightSpec, lane: int) -> Tensor:
        if spec.source not in last:
            last.clear()
            last[spec.source] = read(spec.source)
        return spec.take(last[spec.source], lane)

    return read_lane


def read_from_lane_files(lanes: Sequence[Path], shared: Path) -> ReadLane:
    """Local tensors out of safetensors files, copied: a mapped page would stay resident after its use.

    Args:
        lanes: What the lanes hold parts of, lane 0 first.
        shared: What all of them hold whole.
    """
    header = cache(read_header)  # a rank asks for its own lane's file only
    return lambda spec, lane: read_tensor(spec.name, header(shared if spec.shared else lanes[lane])[spec.name])


class Lanes(list[Any]):
    """One value per lane."""


class Runs(list[Any]):
    """One value per input set."""


class StreamingProgram(fx.Interpreter):
    """Runs all lanes of a program, one after the other at every node.

    Attributes:
        program: The program; its graph is not changed.
    """

    def __init__(self, program: Program, read_lane: ReadLane) -> None:
        """Prepare.

        Args:
            program: See the class.
            read_lane: Gives the weights.
        """
        super().__init__(program.module, garbage_collect_values=True)
        self.program = program
        self._read_lane = read_lane
        self._taps: dict[str, Any] = {}
        self._tap_names: frozenset[str] = frozenset()

    def run_flat(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on the graph's inputs, in the order of `program.inputs`; returns the graph's outputs."""
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self.run(*self.program.weights.values(), *inputs, enable_io_processing=False)
        return outputs

    def run_each(self, inputs: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """Like `run_flat` on several input sets, node by node together, so that each weight is read once for all."""
        if not inputs:
            return []
        outputs = self.run_flat([Runs(values) for values in zip(*inputs, strict=True)])  # type: ignore[misc]
        return [_of_run(outputs, number) for number in range(len(inputs))]

    def run_with_taps(
        self, inputs: Sequence[Tensor], names: Collection[str]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Like `run_flat`, and also the values of some nodes, none of which may differ between lanes."""
        self._tap_names, self._taps = frozenset(names), {}
        outputs = self.run_flat(inputs)
        self._tap_names = frozenset()
        return outputs, self._taps

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._tap_names:
            assert not isinstance(value, Lanes), f"{n.name} differs between lanes"
            self._taps[n.name] = value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.kraken.wait.default:
            return args[0]
        if target is torch.ops.kraken.all_reduce_start.default:
            return _for_each_run(self._reduce, args[0])
        if target is torch.ops.kraken.all_gather.default:
            return _for_each_run(lambda parts: torch.cat(parts, dim=args[1]), args[0])
        if not self._differs((args, kwargs)):
            return self._call(target, *self._on_lane((args, kwargs), 0))
        values = Lanes()
        for lane in range(self.program.degree):
            values.append(self._call(target, *self._on_lane((args, kwargs), lane)))
        return values

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = super().call_function
        return _for_each_run(lambda operands: call(target, *operands), (args, kwargs))

    def _reduce(self, value: Any) -> Tensor:
        if not isinstance(value, Lanes):
            assert isinstance(value, Tensor)
            return value * self.program.degree if self.program.degree > 1 else value
        first, *rest = value
        total: Tensor = first
        for part in rest:
            total = total + part
        return total

    def _differs(self, value: Any) -> bool:
        if isinstance(value, Lanes):
            return True
        if isinstance(value, WeightSpec):
            return bool(value.shards)
        if isinstance(value, (list, tuple)):
            return any(map(self._differs, value))
        return isinstance(value, dict) and any(map(self._differs, value.values()))

    def _on_lane(self, value: Any, lane: int) -> Any:
        """Arguments as lane `lane` sees them, with the weights read."""
        if isinstance(value, Lanes):
            return value[lane]
        if isinstance(value, WeightSpec):
            return self._read_lane(value, lane)
        if isinstance(value, (list, tuple)):
            return type(value)(self._on_lane(element, lane) for element in value)
        if isinstance(value, dict):
            return {key: self._on_lane(element, lane) for key, element in value.items()}
        return value


def _for_each_run(compute: Callable[[Any], Any], operands: Any) -> Any:
    """Compute once, or once for every run if anything among the operands differs between them."""
    runs = _runs(operands)
    return Runs(compute(_of_run(operands, number)) for number in range(runs)) if runs else compute(operands)


def _runs(value: Any) -> int:
    if isinstance(value, Runs):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return max(map(_runs, value), default=0) if isinstance(value, (list, tuple)) else 0


def _of_run(value: Any, number: int) -> Any:
    if isinstance(value, Runs):
        return value[number]
    if isinstance(value, (list, tuple)):
        return type(value)(_of_run(element, number) for element in value)
    if isinstance(value, dict):
        return {key: _of_run(element, number) for key, element in value.items()}
    return value
