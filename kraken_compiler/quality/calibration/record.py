"""Records of a calibration, which can be printed and saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kraken_compiler.quality.calibration.lane_weights import LaneWeights
from kraken_compiler.quality.evaluate import Quality
from kraken_compiler.text import number_text


@dataclass(frozen=True)
class FitRecord:
    """One regression.

    Attributes:
        what: "inputs of lane I" or "output".
        strength: Ridge strength, relative to the Gram matrix's diagonal.
        error: Error on held-back tokens with the new weights over the one with the old.
        kept: False if the old weights stay because new ones did no better.
    """

    what: str
    strength: float
    error: float
    kept: bool


@dataclass(frozen=True)
class BranchRecord:
    """One branch.

    Attributes:
        branch: Its number, 1-based.
        layer: Number of its layer.
        kind: "attention" or "ffn".
        fits: Its regressions.
        note: Why there are none, "" otherwise.
    """

    branch: int
    layer: int
    kind: str
    fits: tuple[FitRecord, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Calibration:
    """New weights for the lanes, and how they came about.

    Attributes:
        weights: The changed weights.
        branches: What was done to every branch.
        tokens: Number of tokens it read.
        texts: What it read.
        qualities: For every text it was measured on: before and after.
    """

    weights: LaneWeights
    branches: tuple[BranchRecord, ...]
    tokens: int
    texts: tuple[str, ...] = ()
    qualities: tuple[tuple[Quality, Quality], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights as plain values."""
        return {
            "tokens": self.tokens,
            "texts": list(self.texts),
            "branches": [asdict(record) for record in self.branches],
            "quality": [{"before": old.to_dict(), "after": new.to_dict()} for old, new in self.qualities],
        }

    def lines(self) -> list[str]:
        """Lines for people, one a text."""
        fits = [fit for branch in self.branches for fit in branch.fits]
        lines = [f"on {self.tokens:,} tokens: {sum(fit.kept for fit in fits)} of {len(fits)} fits help and are kept"]
        for old, new in self.qualities:
            lines.append(
                f"{new.text}, {new.tokens:,} tokens: KL {number_text(old.kl, '.3g')} -> {number_text(new.kl, '.3g')}, "
                f"same top token {old.top1_agreement:.1%} -> {new.top1_agreement:.1%}"
            )
        return lines
