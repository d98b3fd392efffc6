"""Measured points, and what lies between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


def between(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """A value at a place: on straight lines through the points in logarithmic scales, the end's beyond either end.

    Args:
        places: Where there are values, ascending, above 0.
        values: Above 0.
        place: Above 0.
    """
    if place <= places[0]:
        return values[0]
    if place >= places[-1]:
        return values[-1]
    right = bisect_right(places, place)
    share = math.log(place / places[right - 1]) / math.log(places[right] / places[right - 1])
    return values[right - 1] * math.pow(values[right] / values[right - 1], share)
