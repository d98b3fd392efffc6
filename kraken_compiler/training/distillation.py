"""An objective with a teacher: KL(teacher || student) of the next token's distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from kraken_compiler.lanes.evaluate import Quality, evaluate
from kraken_compiler.lanes.logits import LogitsOf
from kraken_compiler.training.loss import distillation_loss
from kraken_compiler.training.objective import Measurement, Share


class Distillation:
    """KL(teacher || student), in nats per token."""

    name: str = "kl"

    def __init__(self, teacher: LogitsOf) -> None:
        """Distil from a model: token ids [B, S] -> logits [B, S, V], in a tensor of its own every time."""
        self._teacher = teacher

    def loss(self, student: LogitsOf, ids: Tensor, share: Share) -> Tensor:
        with torch.no_grad():
            teacher_TV = self._teacher(ids).flatten(0, 1)
        student_TV = student(ids).flatten(0, 1)
        tokens = len(student_TV)
        own = share(tokens)
        return distillation_loss(student_TV[own], teacher_TV[own]) / tokens

    def compare(
        self, student: LogitsOf, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None
    ) -> Quality:
        """Compare the student with its teacher. See `measure`."""
        return evaluate(self._teacher, student, batches, "the held-out part of the texts", progress)

    def measure(
        self, student: LogitsOf, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None
    ) -> Measurement:
        """See `Objective.measure`."""
        quality = asdict(self.compare(student, batches, progress))
        del quality["by_position"]
        return Measurement(quality["kl"], quality)
