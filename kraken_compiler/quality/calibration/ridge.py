"""Ridge regression from second moments, with its strength chosen on tokens that were not fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kraken_compiler.quality.calibration.moments import Moments

STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Ridge strengths to choose from, as shares of the Gram matrix's diagonal."""


@dataclass(frozen=True)
class Fit:
    """A regression and its error on held-out tokens.

    Attributes:
        solution_PT: B, which predicts y as B' x; None if it would do no better than zero.
        strength: The ridge strength, relative to the Gram matrix's diagonal.
        before, after: Error on the held-out tokens without and with the regression; after <= before.
    """

    solution_PT: Tensor | None
    strength: float
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """True if the regression helps."""
        return self.solution_PT is not None


def solve_ridge(moments: Moments, strength: float) -> Tensor:
    """B = (X'X + strength * diag(X'X))^-1 X'Y by Cholesky decomposition, float64 [P, T].

    Every feature is damped by its own size, so the result does not depend on units: activations differ by orders of
    magnitude, and damping all by their mean would leave the largest free and silence the small ones.

    Args:
        moments: Moments of the tokens; those of no tokens, or of features that are all zero, give B = 0.
        strength: Above 0.
    """
    sizes_P = moments.gram_PP.diagonal()
    damped_PP = moments.gram_PP.clone()
    # A feature that is always zero gets no weight, whatever its damping.
    damped_PP.diagonal().add_(strength * torch.where(sizes_P > 0, sizes_P, 1.0))
    return torch.cholesky_solve(moments.cross_PT, torch.linalg.cholesky(damped_PP))


def fit_ridge(
    fit_moments: Moments,
    held_out_moments: Moments,
    strengths: Sequence[float] = STRENGTHS,
    metric_TT: Tensor | None = None,
) -> Fit:
    """Choose the strength on held-out tokens, then fit all tokens with it.

    The error falls and then rises with the strength, so it is followed downhill from the middle.

    Args:
        fit_moments: Tokens to fit.
        held_out_moments: Held-out tokens, with their energy.
        strengths: What to choose from, ascending.
        metric_TT: Weighs the targets' errors in the choice; None means all alike.
    """
    before = held_out_moments.error(None, metric_TT)

    @cache
    def error_at(place: int) -> float:
        return held_out_moments.error(solve_ridge(fit_moments, strengths[place]), metric_TT)

    place = len(strengths) // 2
    while True:
        near = [one for one in (place, place + 1, place - 1) if 0 <= one < len(strengths)]
        best = min(near, key=error_at)
        if best == place:
            break
        place = best
    strength, after = strengths[place], error_at(place)
    if not after < before:
        return Fit(None, strength, before, before)
    return Fit(solve_ridge(fit_moments + held_out_moments, strength), strength, before, after)
