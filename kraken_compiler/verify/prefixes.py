"""The logits that `replay` must give, from runs of whole sequences and of their prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def expected(logits: Tensor, lengths: Sequence[int], steps: int) -> Tensor:
    """The rows of a full run's logits [batch, tokens, vocabulary] that `replay` returns."""
    rows = torch.arange(len(logits))[:, None]
    return logits[rows, torch.tensor(lengths)[:, None] - 1 + torch.arange(steps + 1)]


def prefix_lengths(lengths: Sequence[int], steps: int) -> list[int]:
    """Lengths of the sequences at the prompts' ends and after every step; ascending."""
    return sorted({length + step for length in lengths for step in range(steps + 1)})


def recomputed(logits: Mapping[int, Tensor], lengths: Sequence[int], steps: int) -> Tensor:
    """The logits that `replay` returns, from runs on every prefix.

    Args:
        logits: Of the sequences' first `n` tokens [batch, n, vocabulary], for every `n` that `prefix_lengths` gives.
        lengths: Of the prompts.
        steps: How many tokens follow.
    """
    rows = [[logits[length + step][row, -1] for step in range(steps + 1)] for row, length in enumerate(lengths)]
    return torch.stack([torch.stack(row) for row in rows])
