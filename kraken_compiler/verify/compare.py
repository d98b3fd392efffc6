"""Comparison of the outputs of two programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One comparison of outputs.

    Attributes:
        what: What was compared with what.
        sizes: Batch and sequence size.
        max_abs_error: Largest absolute difference.
        max_rel_error: Largest absolute difference over the largest absolute value of the reference.
        tolerance: What `max_rel_error` may be.
        first_diverging: The first layer that differs by more, "" if none does or layers were not compared.
        noise: The relative error that rounding alone makes, if it was measured: where the usual tolerance is exceeded.
        not_finite: Who computed values that are not finite, if the error is not finite.
    """

    what: str
    sizes: tuple[int, int]
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    first_diverging: str = ""
    noise: float | None = None
    not_finite: str = ""

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance; a NaN is not."""
        return self.max_rel_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        where = f", first diverging: {self.first_diverging}" if self.first_diverging else ""
        noise = f", for its rounding alone makes {self.noise:.1e}" if self.noise is not None else ""
        error = f"relative error {self.max_rel_error:.1e} (tolerance {self.tolerance:.0e}{noise})"
        return f"{self.what}, batch {self.sizes[0]} x {self.sizes[1]}: {verdict}, {self.not_finite or error}{where}"


_FILL_RATIO = 100.0
"""A value that is filled in is so many times larger than what is computed, or more."""


def errors(have: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and that over the largest absolute value that the reference computes.

    What is only filled in, such as -inf or the least number of the type for tokens that a model never gives, is no
    measure of the others: beside it any error would be small.

    Args:
        have: A result.
        want: What it should be, of the same shape.
    """
    assert have.shape == want.shape, f"{tuple(have.shape)} is not {tuple(want.shape)}"
    if not want.is_floating_point():
        return (0.0, 0.0) if torch.equal(have, want) else (float("inf"), float("inf"))
    have, want = without_fill(have.double(), want.double())
    if not want.numel():
        return 0.0, 0.0
    difference = (have - want).abs().max().item()
    scale = want.abs().max().item()
    return difference, difference / scale if scale > 0 else difference


def without_fill(have: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the largest values where they are one number that both have, several times and far from all others.

    Args:
        have, want: Of one shape; they are returned flat.
    """
    have, want = have.flatten(), want.flatten()
    while want.numel():
        sizes = want.abs()
        largest = sizes.max()
        is_largest = sizes == largest
        rest = sizes[~is_largest]
        is_far = rest.numel() > 0 and int(is_largest.sum()) > 1 and bool(largest >= _FILL_RATIO * rest.max())
        if not (is_far or bool(largest.isinf())) or not torch.equal(have[is_largest], want[is_largest]):
            break
        have, want = have[~is_largest], want[~is_largest]
    return have, want


def largest_errors(have: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[float, float]:
    """`errors` over several outputs. A NaN anywhere is returned as NaN, for no comparison may hide it."""
    pairs = [errors(one, other) for one, other in zip(have, want, strict=True)]
    table = torch.tensor(pairs, dtype=torch.float64)
    worst = table.amax(0)
    return worst[0].item(), worst[1].item()


def count_not_finite(who: str, have: Sequence[Tensor], reference: str, want: Sequence[Tensor]) -> str:
    """Count the values that are not finite, in a clause that says who computed them.

    Args:
        who: What computed `have`.
        have: Outputs.
        reference: What computed `want`.
        want: What the outputs should be.

    Returns:
        A clause, "" if all values are finite.
    """
    counts = [
        sum(int((~value.isfinite()).sum()) for value in values if value.is_floating_point()) for values in (have, want)
    ]
    if not any(counts):
        return ""
    mine, theirs = (f"{count:,}" if count else "none" for count in counts)
    return f"not finite: {mine} of the values that {who} computes, {theirs} of {reference}"


def worst_comparison(
    what: str,
    size: tuple[int, int],
    ranks: Sequence[tuple[Tensor, ...]],
    want: tuple[Tensor, ...],
    tolerance: float,
    noise: float | None,
    first_diverging: str = "",
) -> Comparison:
    """The comparison with the rank that is farthest off.

    Args:
        what, size, tolerance, noise, first_diverging: See `Comparison`.
        ranks: Every rank's outputs.
        want: What they should be.
    """
    worst = (0.0, 0.0, 0)
    for rank, results in enumerate(ranks):
        absolute, relative = largest_errors(results, want)
        # A NaN is the worst there is, and compares as neither larger nor smaller.
        if not math.isnan(worst[1]) and not relative <= worst[1]:
            worst = (absolute, relative, rank)
    absolute, relative, rank = worst
    description = f"{what} (worst: rank {rank})"
    # An error that is not a number compares with nothing, so it says nothing: values do.
    wrong = "" if math.isfinite(relative) else count_not_finite(f"rank {rank}", ranks[rank], "the lanes", want)
    return Comparison(description, size, absolute, relative, tolerance, first_diverging, noise, wrong)
