"""What training makes small.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.lanes.logits import LogitsOf

Share = Callable[[int], slice]
"""Function from a number of tokens to those whose loss this process computes."""


@dataclass(frozen=True)
class Measurement:
    """A model on text that it is not trained on.

    Attributes:
        loss: The objective's mean over tokens, in nats.
        record: All that was measured, as plain values.
    """

    loss: float
    record: dict[str, Any]


class Objective(Protocol):
    """A loss of a model's logits.

    Attributes:
        name: What curves call it.
    """

    name: str

    def loss(self, student: LogitsOf, ids: Tensor, share: Share) -> Tensor:
        """This process's part of the mean over tokens; gradients flow to the student.

        Args:
            student: What is trained.
            ids: int64 [B, S].
            share: Which tokens are this process's.
        """
        ...

    def measure(
        self, student: LogitsOf, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None
    ) -> Measurement:
        """Measure without gradients.

        Args:
            student: What is trained.
            batches: Token ids, int64 [B, S].
            progress: Called with the number of tokens of every finished batch.
        """
        ...


class NextToken:
    """Cross-entropy of every next token."""

    name: str = "loss"

    def loss(self, student: LogitsOf, ids: Tensor, share: Share) -> Tensor:
        logits_TV, targets_T = _flat(student(ids), ids)
        own = share(len(targets_T))
        return F.cross_entropy(logits_TV[own].float(), targets_T[own], reduction="sum") / len(targets_T)

    def measure(
        self, student: LogitsOf, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None
    ) -> Measurement:
        total, tokens = 0.0, 0
        for ids in batches:
            logits_TV, targets_T = _flat(student(ids), ids)
            total += F.cross_entropy(logits_TV.float(), targets_T, reduction="sum").item()
            tokens += len(targets_T)
            if progress is not None:
                progress(ids.numel())
        loss = total / tokens
        perplexity = math.exp(loss) if loss < math.log(torch.finfo(torch.float64).max) else math.inf
        return Measurement(loss, {"loss": loss, "perplexity": perplexity, "tokens": tokens})


def _flat(logits_BSV: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that have a next token, and that token."""
    return logits_BSV[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
