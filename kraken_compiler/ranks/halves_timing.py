"""Whether something runs faster in two halves on this machine: timed both ways, by turns. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable

_ROUNDS = 3
_CLEARLY = 0.97
"""Halves must take at most this share of the time: less is within the noise."""


def time_both(seconds: Callable[[bool], float]) -> tuple[float, float]:
    """Time both ways; the first round, which also pays for memory and perhaps for compiling, does not count.

    Args:
        seconds: Runs once, whole or in halves, and gives the time that it took.

    Returns:
        Median seconds of the whole, and of the halves.
    """
    rounds = [[seconds(in_halves) for in_halves in (False, True)] for _ in range(1 + _ROUNDS)]
    whole, halves = (statistics.median(column) for column in zip(*rounds[1:]))
    return whole, halves


def is_faster(whole: float, halves: float) -> bool:
    """True if halves took clearly less time."""
    return halves < _CLEARLY * whole
