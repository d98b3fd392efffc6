"""What a Kraken model is built from. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

from kraken_compiler.errors import UsageError

GELU, SWIGLU = FFNS = ("gelu", "swiglu")
LAYER_NORM, RMS_NORM = NORMS = ("layer", "rms")
LEARNED, ROTARY = POSITIONS = ("learned", "rotary")


@dataclass(frozen=True)
class KrakenConfig:
    """The sizes and kinds of a Kraken model.

    Attributes:
        layers: How many there are.
        width: Width of one lane's stream.
        heads: Query heads of one lane.
        kv_heads: Key and value heads of one lane; None means as many as `heads`.
        expansion: Width of an FFN's inside, in widths of the stream.
        ffn: Its kind, one of `FFNS`.
        degree: How many lanes there are.
        vocabulary: How many tokens there are.
        context: The longest sequence.
        norm: Kind of the norms, one of `NORMS`.
        positions: How positions are told, one of `POSITIONS`.
        rotary_base: Base of rotary positions.
        norm_epsilon: Added to a norm's variance.
        embedding_deviation: Standard deviation of the embedding's first weights. GPT-2's, which the paper has, suits
            its learning rate of 2.5e-4; where the rate is higher a larger one keeps the size of a step in proportion.
    """

    layers: int = 12
    width: int = 678
    heads: int = 6
    kv_heads: int | None = None
    expansion: float = 2.0
    ffn: str = GELU
    degree: int = 2
    vocabulary: int = 50257
    context: int = 1024
    norm: str = LAYER_NORM
    positions: str = LEARNED
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    embedding_deviation: float = 0.02

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            UsageError: One cannot be; says which.
        """
        for name in ("layers", "width", "heads", "degree", "vocabulary", "context", "keys"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise UsageError(f"{name} of a Kraken model must be a whole number, not {value!r}")
            if value < 1:
                raise UsageError(f"a Kraken model needs at least one of its {name}")
        for name, kinds in (("ffn", FFNS), ("norm", NORMS), ("positions", POSITIONS)):
            if getattr(self, name) not in kinds:
                raise UsageError(f"{name} of a Kraken model: choose from {', '.join(kinds)}, not {getattr(self, name)}")
        if self.width % self.heads:
            raise UsageError(f"a width of {self.width} is no multiple of {self.heads} heads")
        if self.heads % self.keys:
            raise UsageError(f"{self.heads} heads are no multiple of {self.keys} key and value heads")
        if self.positions == ROTARY and self.head % 2:
            raise UsageError(f"rotary positions turn pairs: heads of {self.head} are odd")
        for name in ("expansion", "rotary_base", "norm_epsilon", "embedding_deviation"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} of a Kraken model must be a number above 0, not {value}")
        if not math.isfinite(self.width * self.expansion) or self.inside < 1:
            raise UsageError(f"an expansion of {self.expansion} makes no FFN")

    @property
    def keys(self) -> int:
        """Key and value heads of one lane."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def inside(self) -> int:
        """Width of an FFN's inside."""
        return round(self.width * self.expansion)

    @property
    def parameters(self) -> int:
        """How many parameters the model has; embedding and head are one matrix, which all lanes share."""
        norm = self.width * (2 if self.norm == LAYER_NORM else 1)
        attention = self.width * (2 * self.heads + 2 * self.keys) * self.head
        ffn = self.width * self.inside * (3 if self.ffn == SWIGLU else 2)
        # What is added by biases, which the GPT-2 of the paper has and models of today do not.
        biases = (2 * self.width + 2 * self.keys * self.head) + (self.inside + self.width) if self.has_biases else 0
        layer = 2 * norm + attention + ffn + biases
        positions = self.context * self.width if self.positions == LEARNED else 0
        join = self.degree * self.width * self.width
        return self.vocabulary * self.width + positions + self.degree * self.layers * layer + join + norm

    @property
    def has_biases(self) -> bool:
        """True if projections have biases: with layer norms, as GPT-2."""
        return self.norm == LAYER_NORM

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


PRESETS = {
    "kraken-125m-2": KrakenConfig(layers=12, width=678, heads=6, degree=2),
    "kraken-125m-4": KrakenConfig(layers=12, width=504, heads=3, degree=4),
    "kraken-125m-6": KrakenConfig(layers=12, width=418, heads=2, degree=6),
    "kraken-350m-2": KrakenConfig(layers=24, width=888, heads=8, degree=2),
    "kraken-350m-4": KrakenConfig(layers=24, width=644, heads=4, degree=4),
    "kraken-760m-4": KrakenConfig(layers=24, width=960, heads=4, degree=4),
}
"""The models that the paper's authors trained (arXiv 2408.07802), by size and degree."""
