"""One optimizer step, in one process or on every rank together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.logits import LogitsOf, logits_function
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.ops.op_sets import EMBEDDING
from kraken_compiler.training.objective import Measurement, Objective
from kraken_compiler.training.parameters import LaneParameters
from kraken_compiler.training.peers import Alone, Peers
from kraken_compiler.training.settings import BFLOAT16, RunSettings

_RATE_MULTIPLE = "rate_multiple"
"""What a step's learning rate is multiplied by, in a group of the optimizer."""


class DivergenceError(Exception):
    """Error for a loss or gradient that is not finite; names which."""


@dataclass(frozen=True)
class StepResult:
    """Measurements of one step.

    Attributes:
        loss: The objective's mean over the step's tokens before the step, in nats.
        gradient_norm: Global norm of the gradient before clipping.
    """

    loss: float
    gradient_norm: float


class Trainer:
    """A lane program, what it is to learn, and an optimizer.

    Attributes:
        parameters: What is trained.
        objective: What is made small.
        optimizer: AdamW over it.
        settings: The run's.
        peers: Who trains together.
    """

    def __init__(
        self,
        student: LaneRunner,
        parameters: LaneParameters,
        objective: Objective,
        settings: RunSettings,
        *,
        peers: Peers | None = None,
        device: torch.device | str = "cpu",
        embedding_rate: float = 1.0,
    ) -> None:
        """Prepare to train.

        Args:
            student: Runs the lane program.
            parameters: Its weights.
            objective: What is made small.
            settings: The run's.
            peers: Who trains together; None means that this process has all lanes.
            device: Where it computes.
            embedding_rate: The learning rate of weights whose rows are looked up, as a multiple of all others'.
        """
        self.parameters, self.objective, self.settings = parameters, objective, settings
        self.peers: Peers = peers or Alone()
        self._device = torch.device(device)
        self._student = logits_of(student, parameters.operands)
        self._trained_parameters = parameters.trained()
        looked_up = _looked_up(student.program)
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self._trained_parameters.items():
            weight_decay = settings.weight_decay if parameters.is_matrix(name) else 0.0
            multiple = embedding_rate if parameters.weight_name(name) in looked_up else 1.0
            groups.setdefault((weight_decay, multiple), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": weight_decay, _RATE_MULTIPLE: multiple}
                for (weight_decay, multiple), members in groups.items()
            ],
            lr=settings.peak,
            betas=settings.betas,
            fused=True,
        )

    def step(self, ids: Tensor, learning_rate: float) -> StepResult:
        """Train on a batch.

        Args:
            ids: int64 [B, S].
            learning_rate: This step's.

        Raises:
            DivergenceError: The loss or its gradient is not finite; the weights are what they were before the step.
        """
        loss = self.loss(ids)
        mean = self.peers.total(loss.detach()).item()
        if not math.isfinite(mean):
            raise DivergenceError("the loss")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.share_gradients()
        norm = self.clip_gradients()
        if not math.isfinite(norm):
            raise DivergenceError("the gradient")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group[_RATE_MULTIPLE]
        self.optimizer.step()
        return StepResult(mean, norm)

    def loss(self, ids: Tensor) -> Tensor:
        """This process's part of the mean over tokens of the objective."""
        own = ids[self.peers.rows_of(len(ids))].to(self._device)
        if not len(own):
            raise ValueError(f"{len(ids)} rows are too few for {self.peers.count} processes")
        with self._autocast():
            return self.objective.loss(self._student, own, self.peers.tokens_of) * (len(own) / len(ids))

    def share_gradients(self) -> None:
        """Give every process the whole gradient of the weights that all have alike, so that they stay alike."""
        shared_gradients = [
            parameter.grad for name, parameter in self._trained_parameters.items() if self._has_alike(name)
        ]
        gradients = [gradient for gradient in shared_gradients if gradient is not None]
        if not gradients:
            return
        total = self.peers.total(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, whole in zip(
            gradients, torch.split(total, [gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(whole.view_as(gradient))

    def clip_gradients(self) -> float:
        """Scale the gradient down to the largest norm; returns the norm it had. What all processes have counts once."""
        own = shared = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, parameter in self._trained_parameters.items():
            if parameter.grad is None:
                continue
            square = torch.linalg.vector_norm(parameter.grad).double() ** 2
            if self._has_alike(name):
                shared = shared + square
            else:
                own = own + square
        norm = math.sqrt((self.peers.total(own) + shared).item())
        if norm > self.settings.clip:
            for parameter in self._trained_parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.settings.clip / norm)
        return norm

    def evaluate(self, rows: Tensor, progress: Callable[[int], None] | None = None) -> Measurement:
        """Measure what was trained.

        Args:
            rows: int64 [rows, S].
            progress: Called with the number of tokens of every finished batch.
        """
        batches = (batch.to(self._device) for batch in torch.split(rows, self.settings.batch))
        with torch.no_grad(), self._autocast():
            return self.objective.measure(self._student, batches, progress)

    def _has_alike(self, name: str) -> bool:
        return self.peers.has_alike(self.parameters.shared(name))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.precision == BFLOAT16)


def logits_of(runner: LaneRunner, weights: Callable[[], dict[str, Tensor]]) -> LogitsOf:
    """A program as a function from token ids to logits.

    Args:
        runner: Runs it.
        weights: Gives its weights, at every call.
    """
    program = runner.program
    return logits_function(program.inputs, program.call, lambda inputs: runner.run_flat(weights(), inputs))


def _looked_up(program: Program) -> set[str]:
    """The weights whose rows are looked up: embeddings of tokens and positions."""
    return {node.args[0].name for node in program.graph.nodes if node.target is EMBEDDING} & program.weights.keys()
