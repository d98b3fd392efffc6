"""Closed-form calibration: refits a lane program's projections so that it computes what its source computes.

A changed form feeds branches a stale read of the residual stream. Branch by branch, in order of execution:

    input projections    W_i <- W_i (I + B_i'),  B_i predicts the source's fresh input from lane i's stale one
    output projections   [W_1 .. W_N] <- [W_1 .. W_N] + B',  B predicts what the stream lacks of the source's stream
                         from what all lanes feed their output projections

B is a ridge regression (`ridge.py`) on tokens that run through the source and through the lanes side by side, the
lanes with the weights that are calibrated so far; so each fit also corrects what the earlier ones left. Nothing is
differentiated, and nothing is added to the graph.

Tokens weigh what the others read of them (`attention_received.py`): most of all the first of a row, on which attention
rests. In the fits of outputs they also weigh the inverse square of the source's stream, for a norm is the next to read
it: without that, the same few tokens with their massive activations outweigh all others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.lanes.reference import ReadLane
from kraken_compiler.progress import Advance
from kraken_compiler.quality.calibration.attention_received import attention_received
from kraken_compiler.quality.calibration.branch_fit import BranchFit, Streams
from kraken_compiler.quality.calibration.lane_weights import LaneWeights
from kraken_compiler.quality.calibration.lockstep import Lockstep, Values
from kraken_compiler.quality.calibration.record import BranchRecord, Calibration
from kraken_compiler.quality.calibration.refittable import find_refittable
from kraken_compiler.quality.calibration.ridge import STRENGTHS

_MEMORY = 3 << 30
_ATTENTION_ROWS = 4


def calibrate(
    standard: LaneProgram,
    program: LaneProgram,
    read_lane: ReadLane,
    batches: Sequence[list[Tensor]],
    batch_is_held_out: Sequence[bool],
    *,
    strengths: Sequence[float] = STRENGTHS,
    memory: int = _MEMORY,
    advance: Advance | None = None,
) -> Calibration:
    """Refit the projections of a lane program on text.

    Args:
        standard: The source model split over the same lanes in `standard` form.
        program: The lane program; it is not changed.
        read_lane: Gives the weights of both.
        batches: The programs' flat inputs, one list per batch.
        batch_is_held_out: For every batch; one held out is not fitted until the ridge strength is chosen on it.
        strengths: Ridge strengths to choose from.
        memory: Bytes of activations to hold in memory; the rest waits in a temporary directory.
        advance: Is told how many branches are done.

    Returns:
        The lanes' new weights and what was done to every branch.
    """
    weights = LaneWeights(read_lane, program.degree)
    records: list[BranchRecord] = []
    pairs = list(zip(find_refittable(standard), find_refittable(program), strict=True))
    first = first_stale(program)
    ends = [_branch_outputs(one) for one in (standard, program)]
    with tempfile.TemporaryDirectory(prefix="kraken-calibration-") as folder:
        values = Values(Path(folder), memory)
        source = Lockstep(standard, read_lane, batches, values, "source")
        lanes = Lockstep(program, weights.read_lane, batches, values, "lanes")
        streams = Streams(standard, source, lanes, values, batch_is_held_out, _importance(standard, read_lane, batches))
        for number, (of_source, of_lanes) in enumerate(pairs, start=1):
            branch = program.layers.branches[number - 1]
            if number < first:
                records.append(BranchRecord(number, branch.layer, branch.kind, note="reads what the source reads"))
                continue
            if isinstance(of_lanes, Rejection) or isinstance(of_source, Rejection):
                reason = next(one.reason for one in (of_lanes, of_source) if isinstance(one, Rejection))
                streams.settle(*(outputs[number - 1] for outputs in ends))
                records.append(BranchRecord(number, branch.layer, branch.kind, note=f"not refitted: {reason}"))
            else:
                records.append(BranchFit(of_source, of_lanes, streams, weights, tuple(strengths)).run())
            if advance is not None:
                advance(number, len(pairs), "branches")
    tokens = sum(inputs[0].numel() for inputs in batches)
    return Calibration(weights, tuple(records), tokens)


def _importance(standard: LaneProgram, read_lane: ReadLane, batches: Sequence[list[Tensor]]) -> list[Tensor]:
    """Weights of the tokens of every batch, float32 [N].

    How well a token's own prediction is kept counts 1, and as much again what an average token is read; for the first
    of a row that is about a hundred times more. It is a property of positions, so one batch of the longest rows tells.
    Where rows of single tokens add to a position, all tokens there together count what those of the longest rows would.
    """
    longest = max(batches, key=lambda inputs: inputs[0].shape[-1])
    # What has one dim is of positions, as cache_position is.
    some = [value[:_ATTENTION_ROWS] if value.ndim > 1 else value for value in longest]
    received_S = attention_received(standard, read_lane, some)
    rows_S = torch.zeros(len(received_S))
    for inputs in batches:
        rows_S[: inputs[0].shape[-1]] += len(inputs[0])
    weight_S = 1 + received_S * rows_S[-1] / rows_S
    return [weight_S[: inputs[0].shape[-1]].repeat(len(inputs[0])) for inputs in batches]


def first_stale(program: LaneProgram) -> int:
    """The first branch that reads something else than in the source; all later ones inherit its error."""
    for branch, read in zip(program.layers.branches, program.plan.reads, strict=True):
        if not read.own == read.peers == branch.reads:
            return branch.index
    return len(program.plan.reads) + 1


def _branch_outputs(program: LaneProgram) -> list[fx.Node]:
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[branch.output] for branch in program.layers.branches]
