"""Streaming second moments: all that a ridge regression needs to know of any number of tokens.

Legend: N tokens of one batch, P features, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Weighted sums over tokens of products of features x and targets y, in float64.

    Attributes:
        gram_PP: Sum of w x x'.
        cross_PT: Sum of w x y'.
        energy_TT: Sum of w y y'; None where no error is asked for: a fit does without.
    """

    gram_PP: Tensor
    cross_PT: Tensor
    energy_TT: Tensor | None = None

    @classmethod
    def zeros(cls, features: int, targets: int, *, has_energy: bool = False) -> Moments:
        """Sums over no tokens; those with energy can tell errors."""
        f64 = torch.float64
        return cls(
            torch.zeros(features, features, dtype=f64),
            torch.zeros(features, targets, dtype=f64),
            torch.zeros(targets, targets, dtype=f64) if has_energy else None,
        )

    def add(self, x_NP: Tensor, y_NT: Tensor, weight_N: Tensor) -> None:
        """Add a batch of tokens; the products are computed in float32 and summed in float64."""
        weighted_x_NP = x_NP * weight_N[:, None]
        self.gram_PP += weighted_x_NP.T @ x_NP
        self.cross_PT += weighted_x_NP.T @ y_NT
        if self.energy_TT is not None:
            self.energy_TT += (y_NT * weight_N[:, None]).T @ y_NT

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram_PP + other.gram_PP, self.cross_PT + other.cross_PT)

    def error(self, solution_PT: Tensor | None = None, metric_TT: Tensor | None = None) -> float:
        """Weighted sum over tokens of |M^(1/2) (y - B' x)|^2.

        Args:
            solution_PT: B; None means zero.
            metric_TT: M, symmetric; None means the identity.
        """
        assert self.energy_TT is not None
        error = float(self.energy_TT.trace() if metric_TT is None else (self.energy_TT * metric_TT).sum())
        if solution_PT is not None:
            weighed_PT = solution_PT if metric_TT is None else solution_PT @ metric_TT
            error += float(((self.gram_PP @ solution_PT - 2 * self.cross_PT) * weighed_PT).sum())
        return error
