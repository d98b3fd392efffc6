"""The best way to give every lane its number of units: a transportation problem, solved exactly.

Successive shortest paths: every unit begins where it scores best, and as long as a lane has too many, the chain of
moves from lane to lane that loses least brings one of them to a lane that has too few. Lanes are few, so a chain is
found by comparing lanes and never units (Ahuja, Magnanti and Orlin, "Network Flows", 1993, chapter 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import networkx as nx
import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def best_lanes(scores: Scores, sizes: Sequence[int]) -> NDArray[np.int64]:
    """The lane of every unit that makes the sum of the scores largest.

    Args:
        scores: float64 [units, lanes], what a unit is worth on a lane.
        sizes: How many units every lane takes; they add up to the number of units.

    Returns:
        int64 [units].
    """
    units, lanes = scores.shape
    assert sum(sizes) == units
    assert len(sizes) == lanes
    lane_of: NDArray[np.int64] = scores.argmax(1)
    excess = np.bincount(lane_of, minlength=lanes) - np.asarray(sizes)
    moves = {lane: _cheapest_moves(scores, lane_of, lane) for lane in range(lanes)}
    while (excess > 0).any():
        graph = nx.DiGraph()
        for lane, (losses, _) in moves.items():
            graph.add_weighted_edges_from(
                (lane, other, losses[other]) for other in range(lanes) if np.isfinite(losses[other])
            )
        start = int(excess.argmax())
        losses, paths = nx.single_source_bellman_ford(graph, start)
        end = min((lane for lane in losses if excess[lane] < 0), key=losses.__getitem__)
        path = paths[end]
        moved = [(moves[lane][1][other], other) for lane, other in pairwise(path)]
        for unit, lane in moved:
            lane_of[unit] = lane
        excess[start] -= 1
        excess[end] += 1
        moves.update((lane, _cheapest_moves(scores, lane_of, lane)) for lane in path)
    return lane_of


def _cheapest_moves(
    scores: Scores, lane_of: NDArray[np.int64], lane: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For every other lane what is lost when the unit that minds least moves there from `lane`, and that unit."""
    members = np.flatnonzero(lane_of == lane)
    if not len(members):
        return np.full(scores.shape[1], np.inf), np.zeros(scores.shape[1], dtype=np.int64)
    losses = scores[members, lane][:, None] - scores[members]
    losses[:, lane] = np.inf
    least = losses.argmin(0)
    return losses[least, np.arange(scores.shape[1])], members[least]
