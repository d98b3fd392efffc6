"""The learning rate and the rows of a step: functions of its number, so that a resumed run needs no more than that."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kraken_compiler.training.settings import RunSettings

_LAST_SHARE = 0.1
"""Of the highest learning rate, at the end."""


def learning_rate(settings: RunSettings, step: int) -> float:
    """A linear warm-up, then a cosine.

    Args:
        settings: The run's.
        step: Number of the step, 0-based.
    """
    warmup = math.ceil(settings.steps / 10) if settings.warmup is None else settings.warmup
    if step < warmup:
        return settings.peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.peak * (_LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def rows_of_step(rows: Tensor, settings: RunSettings, step: int) -> Tensor:
    """The rows of a step: every pass over all rows has an order of its own.

    Args:
        rows: All training rows, [rows, sequence].
        settings: The run's.
        step: Number of the step, 0-based.

    Returns:
        int64 [batch, sequence].
    """
    first = step * settings.batch
    places = (divmod(first + row, len(rows)) for row in range(settings.batch))
    return rows[[int(_order(settings.seed, turn, len(rows))[place]) for turn, place in places]]


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, count: int) -> Tensor:
    # Every pass has a seed of its own; torch takes 63 bits.
    generator = torch.Generator().manual_seed(((seed << 20) + turn) % (1 << 63))
    return torch.randperm(count, generator=generator)
