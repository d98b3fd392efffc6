"""A lane program as an ordinary `nn.Module`: all lanes in one process, batched by `torch.vmap` over stacked weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from kraken_compiler.backends.single.streaming import StreamingProgram
from kraken_compiler.calling import bind, unflatten_output
from kraken_compiler.ir.capped_attention import capped_attention
from kraken_compiler.ir.dequantize import dequantize
from kraken_compiler.ir.devices import retarget
from kraken_compiler.ir.expert_linear import autocast_expert_linear
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.passes.graph_tools import ATTENTION, CAPPED_ATTENTION, DEQUANTIZE, EXPERT_LINEAR
from kraken_compiler.report import Report
from kraken_compiler.surroundings import autocast_is_on

_NO_BATCHING = ("Batching rule not implemented", "vmap: ")
"""How torch begins to say that an operator cannot be batched."""


class LaneModule(nn.Module):
    """Runs all lanes of a program on one device.

    It has the source model's call signature and output structure, trains, moves between devices and saves like any
    module. A weight that differs between lanes is one parameter of shape [degree, *local shape].

    Attributes:
        program: The lane program.
        weights: Holds the parameters and buffers, by weight-table name.
        report: What was recognised and scheduled, if the module was made by `transform`.
    """

    report: Report | None = None

    def __init__(self, program: LaneProgram) -> None:
        super().__init__()
        self.program = program
        self.weights = nn.Module()
        self._lanes = _batched_graph(program)
        self._batches = True
        self._in_dims = tuple(0 if spec.shards else None for spec in program.weights.values())

    @classmethod
    def from_program(cls, program: LaneProgram, read: SourceReader, frozen: Collection[str] = frozenset()) -> Self:
        """Fill a module with the program's weights.

        Args:
            program: The lane program.
            read: Gives a source tensor by name; called for one tensor at a time, and nothing read is kept.
            frozen: Source tensors whose parts are not trained.
        """
        module = cls(program)
        read = program.reader(read)
        for spec in program.weights.values():
            value = _stacked(spec, read(spec.source), program.degree)
            module._set_weight(spec, value, spec.source not in frozen)
        return module

    def _set_weight(self, spec: WeightSpec, value: Tensor, trained: bool = True) -> None:
        if spec.kind == "parameter":
            differentiable = value.is_floating_point() or value.is_complex()
            self.weights.register_parameter(spec.name, nn.Parameter(value, requires_grad=trained and differentiable))
        else:
            self.weights.register_buffer(spec.name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bind(self.program.call, self.program.inputs, args, kwargs)
        return unflatten_output(self.program.call, self.run_flat(inputs))

    def run_flat(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Run on the graph's inputs, in the order of `program.inputs`; returns the graph's outputs."""
        weights = [getattr(self.weights, name) for name in self.program.weights]
        run: Callable[..., tuple[Tensor, ...]] = self._lanes
        if any(dim is not None for dim in self._in_dims):
            if not self._batches or any(autocast_is_on(tensor.device) for tensor in weights):
                return self._one_lane_after_the_other(weights, inputs)
            in_dims = (*self._in_dims, *(None for _ in inputs))
            try:
                return torch.vmap(run, in_dims=in_dims, out_dims=None)(*weights, *inputs)
            except RuntimeError as error:
                if not str(error).startswith(_NO_BATCHING):
                    raise
                # An operator that vmap does not know; it will not know it next time either.
                self._batches = False
                return self._one_lane_after_the_other(weights, inputs)
        return run(*weights, *inputs)

    def _one_lane_after_the_other(self, weights: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """What vmap computes, op by op as the source has them: autocast sees only what vmap has taken them apart to."""
        stacked = dict(zip(self.program.weights, weights, strict=True))

        def read_lane(spec: WeightSpec, lane: int) -> Tensor:
            return stacked[spec.name][lane] if spec.shards else stacked[spec.name]

        return StreamingProgram(self.program, read_lane, module=self._lanes).run_with_gradients(inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tensor = next(self.weights.parameters(), next(self.weights.buffers(), None))
        if tensor is not None:
            retarget(self._lanes, tensor.device)
        return self


def _stacked(spec: WeightSpec, source: Tensor, degree: int) -> Tensor:
    """All lanes' parts, [degree, *local shape], or the whole tensor if lanes do not differ. Owns its memory."""
    if not spec.shards:
        whole = spec.take(source, 0)
        return whole.clone() if whole.data_ptr() == source.data_ptr() else whole
    stacked = source.new_empty((degree, *spec.shape))
    for lane in range(degree):
        stacked[lane] = spec.take(source, lane)
    return stacked


_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    CAPPED_ATTENTION: capped_attention,
    DEQUANTIZE: dequantize,
    EXPERT_LINEAR: autocast_expert_linear,
}
"""Ops whose functions batch over lanes, and follow autocast, as their operators do."""


def _batched_graph(program: LaneProgram) -> fx.GraphModule:
    """The program's graph for vmap: attention that batches over lanes, and no waits, for the sum is there at once."""
    module = program.copy().module
    for node in list(module.graph.nodes):
        if node.target is ATTENTION:
            node.target = torch.ops.kraken.attention.default
        elif node.target in _WRITTEN_OUT:
            node.target = _WRITTEN_OUT[node.target]
        elif node.target is torch.ops.kraken.wait.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in module.graph.nodes:
        node.meta = {}
    module.recompile()
    return module
