"""Records of a calibration, which can be printed and saved."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kraken_compiler.lanes.evaluate import Quality
from kraken_compiler.quality.calibration.lane_weights import LaneWeights
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
class TrainingRecord:
    """What the training did.

    Attributes:
        steps: Number of optimizer steps.
        tokens: Number of tokens they read, those of every pass counted.
        before, after: KL on rows that nothing was fitted to; NaN if it was not measured.
        kept: False if the weights stay what they were.
        note: Why there were no steps or not all of them, "" otherwise.
    """

    steps: int
    tokens: int
    before: float = math.nan
    after: float = math.nan
    kept: bool = False
    note: str = ""

    def line(self) -> str:
        """A line for people."""
        if not self.steps:
            return f"not trained: {self.note}"
        outcome = "kept" if self.kept else "not kept"
        before, after = (number_text(kl, ".3g") for kl in (self.before, self.after))
        kl = f"KL on rows aside {before} -> {after}, {outcome}"
        return f"trained on {self.tokens:,} tokens in {self.steps} steps: {kl}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Calibration:
    """New weights for the lanes, and how they came about.

    Attributes:
        weights: The changed weights.
        branches: What was done to every branch.
        tokens: Number of tokens it read.
        training: What training end to end did after it; None if it was not asked for.
        texts: What it read.
        qualities: For every text it was measured on: before and after.
    """

    weights: LaneWeights
    branches: tuple[BranchRecord, ...]
    tokens: int
    training: TrainingRecord | None = None
    texts: tuple[str, ...] = ()
    qualities: tuple[tuple[Quality, Quality], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights as plain values."""
        return {
            "tokens": self.tokens,
            "texts": list(self.texts),
            "branches": [asdict(record) for record in self.branches],
            "training": asdict(self.training) if self.training is not None else None,
            "quality": [{"before": old.to_dict(), "after": new.to_dict()} for old, new in self.qualities],
        }

    def lines(self) -> list[str]:
        """Lines for people, one a text."""
        fits = [fit for branch in self.branches for fit in branch.fits]
        lines = [f"on {self.tokens:,} tokens: {sum(fit.kept for fit in fits)} of {len(fits)} fits help and are kept"]
        if self.training is not None:
            lines.append(self.training.line())
        for old, new in self.qualities:
            lines.append(
                f"{new.text}, {new.tokens:,} tokens: KL {number_text(old.kl, '.3g')} -> {number_text(new.kl, '.3g')}, "
                f"same top token {old.top1_agreement:.1%} -> {new.top1_agreement:.1%}"
            )
        return lines
