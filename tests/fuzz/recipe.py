"""What a random decoder is made of, and how one is drawn."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st

POSITIONS = (
    "learned",
    "learned_offset",
    "sinusoidal",
    "rotary_half",
    "rotary_pairs",
    "rotary_partial",
    "rotary_complex",
    "alibi",
    "none",
)
PROJECTIONS = ("separate", "fused", "fused_by_head", "fused_transposed", "einsum")
WEIGHTS = ("plain", "scaled", "cast", "weight_norm", "masked", "low_rank", "stacked")
NORMS = ("layer_norm", "rms_norm", "rms_norm_by_hand", "layer_norm_plain", "none")
PLACES = ("pre", "post", "sandwich", "parallel", "parallel_two_norms")
FFNS = ("plain", "gated", "gated_fused", "gated_interleaved", "experts")
ACTIVATIONS = ("relu", "gelu", "silu", "sigmoid", "relu_squared")
ATTENTIONS = ("sdpa", "sdpa_masked", "by_hand", "window", "softcap", "einsum")
QK_NORMS = ("none", "per_head", "wide")
HEADS = ("untied", "tied", "biased", "scaled", "capped")
SIZE_RULES = (
    "none",
    "long",
    "short",
    "even",
    "one_row",
    "one_token",
    "many_tokens",
    "log_length",
    "from_the_end",
    "share_of_length",
    "divided_by_length",
)
"""What depends on a size: an `if` in Python or, from "log_length" on, numbers in the graph."""

IN_PYTHON = frozenset(SIZE_RULES[1:7])
"""The rules by which a program may be limited to some sizes."""


@dataclass(frozen=True)
class Recipe:
    """One decoder, one degree.

    Attributes:
        degree: Number of lanes.
        heads, kv_heads, head_size: Of attention.
        columns: FFN columns.
        layers: How many.
        dtype: Element type of weights and stream.
        weight_place: Which projection's weight is computed: "out", "down", "in" or "all".
        branch_scale: Factor on what a branch adds, 1.0 for none; -1.0 for a learned vector.
        seed: Of the weights.
        The rest name one of the choices above.
    """

    degree: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 8
    columns: int = 24
    layers: int = 2
    dtype: str = "float32"
    positions: str = "learned"
    projections: str = "separate"
    attention: str = "sdpa"
    qk_norm: str = "none"
    weights: str = "plain"
    weight_place: str = "out"
    norm: str = "layer_norm"
    place: str = "pre"
    ffn: str = "plain"
    activation: str = "gelu"
    biases: bool = True
    branch_scale: float = 1.0
    head: str = "untied"
    size_rule: str = "none"
    size_place: str = "embedding"
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def precision(self) -> str:
        """The least exact element type that it computes in."""
        return "float32" if self.positions == "rotary_complex" else self.dtype

    @property
    def refusal(self) -> str:
        """Words of the reason for which the model is refused; "" if it must be taken."""
        refused = self.ffn == "experts" and self.place == "sandwich"
        return "stands between the branch's output projection and the residual stream" if refused else ""

    @property
    def has_cache(self) -> bool:
        """True if nothing stands in the way of a KV cache; a size rule may."""
        return self.size_rule == "none"

    def __repr__(self) -> str:
        """Only what differs from the defaults, so that a counterexample says what matters."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in given.items() if value != _default(name))})"


def _default(name: str) -> Any:
    return next(one.default for one in fields(Recipe) if one.name == name)


@st.composite
def recipes(draw: st.DrawFn, degree: int) -> Recipe:
    """A decoder for `degree` lanes, whose choices go together. Defaults come first: hypothesis shrinks to them."""
    heads = draw(st.integers(max(degree, 1), 6))
    kv_heads = draw(st.sampled_from([count for count in range(heads, 0, -1) if heads % count == 0]))
    projections = draw(st.sampled_from(PROJECTIONS if kv_heads == heads else ("separate", "fused")))
    place = draw(st.sampled_from(PLACES))
    attention = draw(st.sampled_from(ATTENTIONS))
    norm = draw(st.sampled_from(NORMS))
    if place in ("post", "sandwich") and norm == "none":
        norm = "layer_norm"
    return Recipe(
        degree=degree,
        heads=heads,
        kv_heads=kv_heads,
        head_size=draw(st.sampled_from((8, 4, 12))),
        columns=draw(st.integers(max(degree, 4), 30)),
        layers=draw(st.sampled_from((1, 1, 2))),
        dtype=draw(st.sampled_from(("float32", "float32", "float64"))),
        positions=draw(st.sampled_from(POSITIONS)),
        projections=projections,
        attention=attention,
        qk_norm=draw(st.sampled_from(QK_NORMS)),
        weights=draw(st.sampled_from(WEIGHTS)),
        weight_place=draw(st.sampled_from(("out", "down", "in", "all"))),
        norm=norm,
        place=place,
        ffn=draw(st.sampled_from(FFNS)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        biases=draw(st.booleans()),
        branch_scale=draw(st.sampled_from((1.0, 0.5, -1.0))),
        head=draw(st.sampled_from(HEADS)),
        size_rule=draw(st.sampled_from(("none",) * 10 + SIZE_RULES)),
        size_place=draw(st.sampled_from(("embedding", "attention", "ffn"))),
        seed=draw(st.integers(0, 3)),
    )
