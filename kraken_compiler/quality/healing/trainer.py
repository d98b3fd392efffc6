"""One optimizer step of self-distillation, in one process or on every rank together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_compiler.lanes.logits import LogitsOf, logits_function
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.quality.evaluate import Quality, evaluate
from kraken_compiler.quality.healing.loss import distillation_loss
from kraken_compiler.quality.healing.parameters import LaneParameters
from kraken_compiler.quality.healing.peers import Alone, Peers, share_of
from kraken_compiler.quality.healing.settings import HealSettings


class DivergenceError(Exception):
    """Error for a loss or gradient that is not finite; names which."""


@dataclass(frozen=True)
class StepResult:
    """Measurements of one step.

    Attributes:
        kl: Mean over the step's tokens of KL(teacher || student) before the step, in nats.
        gradient_norm: Global norm of the gradient before clipping.
    """

    kl: float
    gradient_norm: float


class Trainer:
    """A student, its teacher and an optimizer.

    Attributes:
        parameters: What is trained.
        optimizer: AdamW over it.
        settings: The run's.
        peers: Who trains together.
    """

    def __init__(
        self,
        student: LaneRunner,
        parameters: LaneParameters,
        teacher: LogitsOf,
        settings: HealSettings,
        *,
        peers: Peers | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare to train.

        Args:
            student: Runs the lane program.
            parameters: Its weights.
            teacher: The source model: token ids [B, S] -> logits [B, S, V], in a tensor of its own every time.
            settings: The run's.
            peers: Who trains together; None means that this process has all lanes.
            device: Where it computes.
        """
        self.parameters, self.settings = parameters, settings
        self.peers: Peers = peers or Alone()
        self._device = torch.device(device)
        self._teacher = teacher
        self._student = _logits_of(student, parameters.operands)
        self._trained_parameters = parameters.trained()
        self.optimizer = torch.optim.AdamW(
            self._trained_parameters.values(), lr=settings.peak, weight_decay=settings.weight_decay, fused=True
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
        kl = self.peers.total(loss.detach()).item()
        if not math.isfinite(kl):
            raise DivergenceError("the loss")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.share_gradients()
        norm = self.clip_gradients()
        if not math.isfinite(norm):
            raise DivergenceError("the gradient")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return StepResult(kl, norm)

    def loss(self, ids: Tensor) -> Tensor:
        """This process's part of the mean over tokens of KL(teacher || student)."""
        ids = ids.to(self._device)
        with self._autocast():
            with torch.no_grad():
                teacher_TV = self._teacher(ids).flatten(0, 1)
            student_TV = self._student(ids).flatten(0, 1)
        tokens = len(student_TV)
        if self.peers.count > 1:
            own = share_of(self.peers, tokens)
            student_TV, teacher_TV = student_TV[own], teacher_TV[own]
        return distillation_loss(student_TV, teacher_TV) / tokens

    def share_gradients(self) -> None:
        """Give every process the whole gradient of the weights that all lanes hold alike, so that they stay alike."""
        if self.peers.count == 1:
            return
        shared_gradients = [
            parameter.grad for name, parameter in self._trained_parameters.items() if self.parameters.shared(name)
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
        """Scale the gradient down to the largest norm; returns the norm it had. What all lanes hold counts once."""
        own = shared = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, parameter in self._trained_parameters.items():
            if parameter.grad is None:
                continue
            square = torch.linalg.vector_norm(parameter.grad).double() ** 2
            if self.peers.count > 1 and self.parameters.shared(name):
                shared = shared + square
            else:
                own = own + square
        norm = math.sqrt((self.peers.total(own) + shared).item())
        if norm > self.settings.clip:
            for parameter in self._trained_parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.settings.clip / norm)
        return norm

    def evaluate(self, rows: Tensor, text: str, progress: Callable[[int], None] | None = None) -> Quality:
        """Compare the student with its teacher.

        Args:
            rows: int64 [rows, S].
            text: What they are.
            progress: Called with the number of tokens of every finished batch.
        """
        batches = (batch.to(self._device) for batch in torch.split(rows, self.settings.batch))
        with torch.no_grad(), self._autocast():
            return evaluate(self._teacher, self._student, batches, text, progress)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")


def teacher_of(runner: LaneRunner, weights: dict[str, Tensor]) -> LogitsOf:
    """A program with fixed weights as a teacher."""
    return _logits_of(runner, lambda: weights)


def _logits_of(runner: LaneRunner, weights: Callable[[], dict[str, Tensor]]) -> LogitsOf:
    program = runner.program
    return logits_function(program.inputs, program.call, lambda inputs: runner.run_flat(weights(), inputs))
