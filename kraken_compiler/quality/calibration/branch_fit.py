"""Refits the projections of one branch.

Legend: N tokens of one batch, P features, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.quality.calibration.lane_weights import LaneWeights
from kraken_compiler.quality.calibration.lockstep import Lockstep, Values
from kraken_compiler.quality.calibration.moments import Moments
from kraken_compiler.quality.calibration.record import BranchRecord, FitRecord
from kraken_compiler.quality.calibration.refittable import Projection, Refittable
from kraken_compiler.quality.calibration.ridge import Fit, fit_ridge


class Streams:
    """The source and the lanes on the same batches, and the gap between their streams.

    Args:
        standard: The source as a lane program in `standard` form.
        source, lanes: The two programs under way.
        values: Where the gap waits.
        batch_is_held_out: For every batch whether it is held out.
        importance: For every batch float32 [N], what each of its tokens counts in the fits.
    """

    def __init__(
        self,
        standard: LaneProgram,
        source: Lockstep,
        lanes: Lockstep,
        values: Values,
        batch_is_held_out: Sequence[bool],
        importance: Sequence[Tensor],
    ) -> None:
        self.source, self.lanes, self.degree = source, lanes, standard.degree
        self.batch_is_held_out = tuple(batch_is_held_out)
        self.importance = tuple(importance)
        self._values = values
        self._has_gap = False
        branches = standard.layers.branches
        # A norm between a sum and the next read does not commute with it: what a stream lacks is no sum of differences.
        self._is_sum = not any(branch.post or branch.after for branch in branches)
        nodes = {node.name: node for node in standard.graph.nodes}
        self._joins: list[tuple[int, fx.Node]] = [(point, nodes[name]) for point, name in standard.layers.joins]

    def after(self, branch: int) -> fx.Node:
        """The source's stream once a branch has contributed, or where the branch read it if another joins with it."""
        return next(node for point, node in reversed(self._joins) if point <= branch)

    def gap(self, batch: int) -> Tensor | float:
        """The source's stream minus the lanes' after the branches so far, of one batch.

        0 where norms follow branches: each is then fitted to what it gives in the source.
        """
        value: Tensor | float = self._values.get(f"gap-{batch}") if self._has_gap else 0.0
        return value

    def settle(self, of_source: fx.Node, of_lanes: fx.Node) -> None:
        """Let a branch contribute to both streams."""
        pairs = zip(self.source.advance([of_source]), self.lanes.advance([of_lanes]), strict=True)
        for batch, (source, lanes) in enumerate(pairs):
            if not self._is_sum:
                continue
            gap = self.gap(batch) + total(source[of_source], self.degree) - total(lanes[of_lanes], self.degree)
            self._values.put(f"gap-{batch}", gap)
        self._has_gap = self._is_sum


_MASSIVE = 10.0
"""A token whose squared stream is more than this many times the median counts as massive."""
_UNEQUAL = "output: more than a factor lies between the projection and the stream"


@dataclass
class BranchFit:
    """Refits one branch.

    Attributes:
        of_source, of_lanes: The branch in the source's program and in the lanes'.
        streams: Both, up to this branch.
        weights: Takes the new weights.
        strengths: Ridge strengths to choose from.
    """

    of_source: Refittable
    of_lanes: Refittable
    streams: Streams
    weights: LaneWeights
    strengths: Sequence[float]

    def run(self) -> BranchRecord:
        """Refit the input projections, then the output projection, then let the branch contribute."""
        branch = self.of_lanes.branch
        fits: list[FitRecord] = []
        for of_source, of_lanes in zip(self.of_source.inputs, self.of_lanes.inputs, strict=True):
            fits += self._fit_inputs(of_source[0].input, of_lanes)
        fits.append(self._fit_output())
        self.streams.settle(self.of_source.end, self.of_lanes.end)
        return BranchRecord(branch.index, branch.layer, branch.kind, tuple(fits))

    def _fit_inputs(self, fresh: fx.Node, group: Sequence[Projection]) -> list[FitRecord]:
        stale = group[0].input
        has_bias = all(projection.owns_bias for projection in group)
        fit_moments: list[Moments] = []
        held_out_moments: list[Moments] = []
        pairs = zip(self.streams.source.advance([fresh]), self.streams.lanes.advance([stale]), strict=True)
        for batch, (source, lanes) in enumerate(pairs):
            fresh_NT = rows(source[fresh])
            for lane, value in enumerate(per_lane(lanes[stale], self.degree)):
                x_NP = rows(value)
                if not fit_moments:
                    features, targets = x_NP.shape[1] + has_bias, x_NP.shape[1]
                    fit_moments = [Moments.zeros(features, targets) for _ in range(self.degree)]
                    held_out_moments = [Moments.zeros(features, targets, has_energy=True) for _ in range(self.degree)]
                moments = (held_out_moments if self.streams.batch_is_held_out[batch] else fit_moments)[lane]
                moments.add(_with_ones(x_NP, has_bias), fresh_NT - x_NP, self.streams.importance[batch])
        choices = []
        for lane in range(self.degree):
            metric_TT = gram(torch.cat([self._matrix(projection, lane) for projection in group]))
            choices.append(fit_ridge(fit_moments[lane], held_out_moments[lane], self.strengths, metric_TT))
        for projection in group:
            self._refit_input(projection, choices, has_bias)
        return [_record(f"inputs of lane {lane}", choice) for lane, choice in enumerate(choices)]

    def _fit_output(self) -> FitRecord:
        output = self.of_lanes.output
        has_bias = output.owns_bias
        after, end, source_node = (
            self.streams.after(self.of_lanes.branch.index),
            self.of_source.end,
            self.of_source.output.node,
        )
        fit_moments = held_out_moments = None
        scale = None
        pairs = zip(
            self.streams.source.advance([source_node, end, after]),
            self.streams.lanes.advance([output.input]),
            strict=True,
        )
        for batch, (source, lanes) in enumerate(pairs):
            scale = scale or _factor(source[source_node], source[end])
            if scale is None:
                continue
            x_NP = torch.cat([rows(value) for value in per_lane(lanes[output.input], self.degree)], dim=-1)
            target_NT = rows(self.streams.gap(batch) + total(source[end], self.degree)) / scale - self._parts(x_NP)
            if fit_moments is None or held_out_moments is None:
                features = x_NP.shape[1] + has_bias
                fit_moments, held_out_moments = (
                    Moments.zeros(features, target_NT.shape[1], has_energy=one) for one in (False, True)
                )
            contribution = total(source[end], self.degree)
            # A norm after the branch reads its sum and not the stream.
            stream = contribution if self.of_source.branch.post else source[after]
            weight_N = _output_weight(self.streams.importance[batch], stream, contribution)
            (held_out_moments if self.streams.batch_is_held_out[batch] else fit_moments).add(
                _with_ones(x_NP, has_bias), target_NT, weight_N
            )
        if fit_moments is None or held_out_moments is None:
            return FitRecord(_UNEQUAL, 0.0, 1.0, kept=False)
        choice = fit_ridge(fit_moments, held_out_moments, self.strengths)
        if choice.solution_PT is not None:
            self._refit_output(choice.solution_PT, has_bias)
        return _record("output", choice)

    def _parts(self, x_NP: Tensor) -> Tensor:
        """The sum of all lanes' output projections of their inputs, with the weights as they are."""
        output = self.of_lanes.output
        matrix = torch.cat([self._matrix(output, lane) for lane in range(self.degree)], dim=1)
        parts_NT = x_NP @ matrix.T
        if (bias := output.bias) is not None:
            parts_NT = parts_NT + sum(self.weights.read_lane(bias, lane).float() for lane in range(self.degree))
        return parts_NT

    def _refit_input(self, projection: Projection, choices: Sequence[Fit], has_bias: bool) -> None:
        if not any(choice.kept for choice in choices):
            return
        matrices, biases = [], []
        for lane, choice in enumerate(choices):
            matrix = self._matrix(projection, lane)
            bias = self.weights.read_lane(projection.bias, lane).float() if projection.bias is not None else None
            if choice.solution_PT is not None:
                solution = choice.solution_PT.float()
                if has_bias and bias is not None:
                    bias = bias + matrix @ solution[-1]
                matrix = matrix + matrix @ solution[: matrix.shape[1]].T
            matrices.append(projection.as_stored(matrix))
            biases.append(bias)
        self.weights.change(projection.weight, matrices)
        if has_bias and projection.bias is not None:
            self.weights.change(projection.bias, [bias for bias in biases if bias is not None])

    def _refit_output(self, solution_PT: Tensor, has_bias: bool) -> None:
        output = self.of_lanes.output
        change = solution_PT.float()
        matrices, start = [], 0
        for lane in range(self.degree):
            matrix = self._matrix(output, lane)
            columns = matrix.shape[1]
            matrices.append(output.as_stored(matrix + change[start : start + columns].T))
            start += columns
        self.weights.change(output.weight, matrices)
        if has_bias and output.bias is not None:
            share = change[-1] / self.degree
            bias = output.bias
            self.weights.change(
                bias, [self.weights.read_lane(bias, lane).float() + share for lane in range(self.degree)]
            )

    def _matrix(self, projection: Projection, lane: int) -> Tensor:
        """A lane's weight as its linear reads it, float32 [out, in]."""
        return projection.as_matrix(self.weights.read_lane(projection.weight, lane)).float()

    @property
    def degree(self) -> int:
        return self.weights.degree


def total(value: Any, degree: int) -> Tensor:
    """The sum over lanes, in float32."""
    parts = per_lane(value, degree)
    lane_sum: Tensor = sum((part.float() for part in parts[1:]), parts[0].float())
    return lane_sum


def per_lane(value: Any, degree: int) -> list[Tensor]:
    """One tensor per lane, also where lanes do not differ."""
    return list(value) if isinstance(value, list) else [value] * degree


def rows(value: Tensor) -> Tensor:
    """Float32, one row per token."""
    return value.reshape(-1, value.shape[-1]).float()


def gram(matrix: Tensor) -> Tensor:
    """W'W of a matrix [out, in], float64."""
    return matrix.double().T @ matrix.double()


def _output_weight(importance_N: Tensor, stream: Tensor, contribution: Tensor) -> Tensor:
    """Weights of tokens in the fit of an output projection, float32 [N].

    The inverse square of the stream, for a norm reads it. An important token counts more where the branch has a share
    in its stream; and one whose stream is far larger than the others' counts only there: everywhere else what it lacks
    is not this branch's to give, and would drown what the other tokens lack.

    Args:
        importance_N: What tokens count in the fits of inputs.
        stream: The source's stream once the branch has contributed.
        contribution: What the source's branch contributes.
    """
    size_N, contribution_N = (rows(value).pow(2).mean(-1).clamp_min(1e-12) for value in (stream, contribution))
    share_N = (contribution_N / size_N).clamp_max(1.0)
    massive_N = ((contribution_N + _MASSIVE * size_N.median()) / size_N).clamp_max(1.0)
    return (1 + (importance_N - 1) * share_N) * massive_N / size_N


def _with_ones(x_NP: Tensor, has_bias: bool) -> Tensor:
    return torch.cat([x_NP, x_NP.new_ones(x_NP.shape[0], 1)], dim=1) if has_bias else x_NP


def _factor(projection: Any, contribution: Any) -> float | None:
    """The number that turns a projection's result into what the branch adds to the stream; None if it is no number."""
    before, after = (per_lane(value, 1)[0].double() for value in (projection, contribution))
    if before.shape != after.shape:
        return None
    factor = float((before * after).sum() / (before * before).sum().clamp_min(1e-300))
    # A half type rounds every product.
    tolerance = max(1e-3, torch.finfo(per_lane(contribution, 1)[0].dtype).eps)
    return factor if factor and torch.allclose(after, factor * before, rtol=tolerance, atol=1e-6) else None


def _record(what: str, fit: Fit) -> FitRecord:
    return FitRecord(what, fit.strength, fit.after / fit.before if fit.before > 0 else 1.0, fit.kept)
