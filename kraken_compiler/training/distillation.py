"""An objective with a teacher: KL(teacher || student) of the next token's distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Self

import torch
from torch import Tensor

from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import lane_weights
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.lanes.logits import LogitsOf
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.training.loss import distillation_loss
from kraken_compiler.training.objective import Measurement, Share
from kraken_compiler.training.trainer import logits_of


class Distillation:
    """KL(teacher || student), in nats per token."""

    name: str = "kl"

    @classmethod
    def from_source(cls, program: Program, read: SourceReader, device: torch.device) -> Self:
        """Distil from a model as a program of one lane.

        Args:
            program: It, in standard form.
            read: Gives its tensors.
            device: Where it computes.
        """
        weights = {
            name: value.to(device) for name, value in lane_weights(program.weights, 0, program.reader(read)).items()
        }
        return cls(logits_of(LaneRunner(program, device=device), lambda: weights), of_any_rows=True)

    def __init__(self, teacher: LogitsOf, *, of_any_rows: bool = False) -> None:
        """Distil from a model.

        Args:
            teacher: Token ids [B, S] -> logits [B, S, V], in a tensor of its own every time.
            of_any_rows: It computes by itself: where the loss of some rows is another process's, they are left out.
        """
        self._teacher, self._of_any_rows = teacher, of_any_rows

    def loss(self, student: LogitsOf, ids: Tensor, share: Share) -> Tensor:
        length, tokens = ids.shape[1], ids.numel()
        begin, end, _ = share(tokens).indices(tokens)
        rows = slice(begin // length, -(-end // length)) if self._of_any_rows else slice(None)
        before = rows.start * length if self._of_any_rows else 0
        with torch.no_grad():
            teacher_TV = self._teacher(ids[rows]).flatten(0, 1)
        student_TV = student(ids).flatten(0, 1)
        return distillation_loss(student_TV[begin:end], teacher_TV[begin - before : end - before]) / tokens

    def measure(
        self, student: LogitsOf, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None
    ) -> Measurement:
        """See `Objective.measure`."""
        quality = asdict(evaluate(self._teacher, student, batches, "the held-out part of the texts", progress))
        del quality["by_position"]
        return Measurement(quality["kl"], quality)
