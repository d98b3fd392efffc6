"""Ridge regression from second moments, with its strength chosen on tokens that were not fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_compiler.quality.calibration.moments import Moments

STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Ridge strengths to choose from, as shares of the Gram matrix's diagonal."""

_FLOOR = 1e-6


@dataclass(frozen=True)
class Fit:
    """A regression and what it does on held-back tokens.

    Attributes:
        solution_PT: B, which predicts y as B' x; None if it would do no better than zero.
        strength: The ridge strength, relative to the Gram matrix's diagonal.
        before, after: Error on the held-back tokens without and with the regression; after <= before.
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
    if not sizes_P.mean() > 0:
        return torch.zeros_like(moments.cross_PT)
    damped = moments.gram_PP.clone()
    # A feature that is always zero has no size; the floor keeps the matrix positive definite.
    damped.diagonal().add_(strength * (sizes_P + _FLOOR * sizes_P.mean()))
    return torch.cholesky_solve(moments.cross_PT, torch.linalg.cholesky(damped))


def fit_ridge(
    fitted: Moments,
    held: Moments,
    strengths: Sequence[float] = STRENGTHS,
    metric_TT: Tensor | None = None,
) -> Fit:
    """Choose the strength on held-back tokens, then fit all tokens with it.

    Args:
        fitted: Tokens to fit.
        held: Held-back tokens.
        strengths: What to choose from.
        metric_TT: Weighs the targets' errors in the choice; None means all alike.
    """
    before = held.error(None, metric_TT)
    errors = [held.error(solve_ridge(fitted, strength), metric_TT) for strength in strengths]
    after, strength = min(zip(errors, strengths, strict=True))
    if not after < before:
        return Fit(None, strength, before, before)
    return Fit(solve_ridge(fitted + held, strength), strength, before, after)
