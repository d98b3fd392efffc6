"""The weights that are trained: float32, one small module each, so that peft can wrap a single weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.weights.lane_tensors import ReadLane


class TrainedWeight(nn.Module):
    """One weight. It is called, with an operand that is ignored, because peft changes what a call gives."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self, _: Tensor) -> Tensor:
        return self.weight


class LaneParameters(nn.Module):
    """Every weight of a lane program, and which of them are trained.

    Attributes:
        trainable: The trained ones, by name.
        fixed: The others, by name.
        table: The weight table.
    """

    def __init__(
        self,
        table: Mapping[str, WeightSpec],
        read: Callable[[WeightSpec], Tensor],
        device: torch.device | str = "cpu",
        *,
        trained: Callable[[WeightSpec], bool] | None = None,
    ) -> None:
        """Read all weights.

        Args:
            table: The weight table.
            read: Gives a weight as the program takes it, which may be the user's own tensor: what is trained is a copy.
            device: Where they go.
            trained: Whether a weight is trained, of those that a model learns; None means all.
        """
        super().__init__()
        self.table = dict(table)
        self.trainable = nn.ModuleDict()
        self.fixed: dict[str, Tensor] = {}
        for name, spec in table.items():
            value = read(spec)
            if is_trained(spec) and (trained is None or trained(spec)):
                self.trainable[name] = TrainedWeight(value.to(device, torch.float32, copy=True))
            else:
                self.fixed[name] = value.to(device)

    @classmethod
    def of_all_lanes(
        cls,
        program: Program,
        read_lane: ReadLane,
        device: torch.device | str = "cpu",
        *,
        trained: Callable[[WeightSpec], bool] | None = None,
    ) -> LaneParameters:
        """The weights of a lane program as `LaneRunner` takes them in one process; those that differ are stacked."""

        def read(spec: WeightSpec) -> Tensor:
            if spec.shared:
                return read_lane(spec, 0)
            return torch.stack([read_lane(spec, lane) for lane in range(program.degree)])

        return cls(program.weights, read, device, trained=trained)

    def operands(self) -> dict[str, Tensor]:
        """Every weight in the program's element type; gradients flow to those that are trained."""
        operand = torch.empty(0)
        operands = {}
        for name, spec in self.table.items():
            operands[name] = (
                self.trainable[name](operand).to(spec.torch_dtype) if name in self.trainable else self.fixed[name]
            )
        return operands

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer changes, by name."""
        return {name: parameter for name, parameter in self.trainable.named_parameters() if parameter.requires_grad}

    def shared(self, name: str) -> bool:
        """True if all lanes hold a trained parameter alike; `name` is as `trained` gives it."""
        return self.table[self.weight_name(name)].shared

    def is_matrix(self, name: str) -> bool:
        """True for a trained parameter of two dims or more in the model; `name` is as `trained` gives it."""
        return len(self.table[self.weight_name(name)].shape) > 1

    def weight_name(self, name: str) -> str:
        """The weight of a trained parameter, as the table names it; `name` is as `trained` gives it."""
        return name.partition(".")[0]

    def results(self) -> Iterator[tuple[WeightSpec, Tensor]]:
        """The trained weights in the program's element type; LoRA's updates must have been merged."""
        for name, module in self.trainable.items():
            assert isinstance(module, TrainedWeight), f"{name}: updates are not merged"
            yield self.table[name], module.weight.detach().to(self.table[name].torch_dtype)


def is_trained(spec: WeightSpec) -> bool:
    """True for a weight that a model learns: buffers and constants stay."""
    return spec.kind == "parameter" and spec.torch_dtype.is_floating_point
