"""A lane program as an ordinary `nn.Module`: all lanes in one process, over stacked weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.calling import bind, unflatten_output
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.surroundings import autocast_is_on

if TYPE_CHECKING:
    from kraken_compiler.verify.report import Report


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
        self._runner = LaneRunner(program)

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
            value = _stack(spec, read(spec.source), program.degree)
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
        weights = {name: getattr(self.weights, name) for name in self.program.weights}
        batched = not any(autocast_is_on(weight.device) for weight in weights.values())
        return self._runner.run_flat(weights, inputs, batched=batched)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the runner, which follows from the program and cannot be written to a file."""
        return {name: value for name, value in self.__dict__.items() if name != "_runner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._runner = LaneRunner(self.program, device=self._device())

    def _device(self) -> torch.device:
        tensor = next(self.weights.parameters(), next(self.weights.buffers(), None))
        return torch.device("cpu") if tensor is None else tensor.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._runner.to(self._device())
        return self


def _stack(spec: WeightSpec, source: Tensor, degree: int) -> Tensor:
    """All lanes' parts, [degree, *local shape], or the whole tensor if lanes do not differ. Owns its memory."""
    if not spec.shards:
        whole = spec.take(source, 0)
        return whole.clone() if whole.data_ptr() == source.data_ptr() else whole
    parts = source.new_empty((degree, *spec.shape))
    for lane in range(degree):
        parts[lane] = spec.take(source, lane)
    return parts
