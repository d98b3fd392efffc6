"""Which degrees a model can be split to, as far as its head and column counts tell."""

from __future__ import annotations

from kraken_compiler.ir.layers import Branch, LayerTable


def valid_degrees(layers: LayerTable) -> tuple[int, ...]:
    """Every degree that divides the heads and FFN columns of all layers; 1 included.

    KV heads are split too, or replicated when the degree exceeds them, so one count must divide the other.
    """
    most = max((branch.heads for branch in layers.branches), default=1)
    return tuple(degree for degree in range(1, most + 1) if all(_divides(degree, branch) for branch in layers.branches))


def smallest_degree(layers: LayerTable) -> int:
    """The smallest valid degree above 1, or 1 if there is none."""
    return next((degree for degree in valid_degrees(layers) if degree > 1), 1)


def _divides(degree: int, branch: Branch) -> bool:
    if branch.kind == "ffn":
        return branch.columns % degree == 0
    kv_heads = branch.kv_heads or branch.heads
    return branch.heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)
