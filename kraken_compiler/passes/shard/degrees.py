"""The spread of heads and FFN columns over lanes, and the degrees that need no padding for it.

What a degree does not divide is padded: all lanes compute equally many heads or columns, some of them copies of the
next lane's, which the lane's output projection multiplies by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from kraken_compiler.ir.layers import Branch, LayerTable

DEGREE_HINT = "Try another degree; one that divides the heads, the KV heads and the FFN columns is the least demanding."
"""The hint where a degree asks for parts that a lane cannot compute by itself."""

KV_HEAD_OF = "kraken.kv_head_of"
"""Prefix of the names of constants that say which KV head every head reads."""


@dataclass(frozen=True)
class Share:
    """The share that a lane has of a number of heads or columns: it computes start..stop, and start..owned count.

    Legend: 8 heads on 3 lanes are 0..2, 2..5 and 5..8 (owned), and the first lane computes 0..3.
    """

    start: int
    owned: int
    stop: int


def spread(count: int, degree: int, unit: int = 1) -> tuple[Share, ...]:
    """`count` positions over `degree` lanes as evenly as can be, `unit` of them always together.

    The smaller shares come first: what pads them follows them.
    """
    units = count // unit
    size, larger = -(-units // degree), units % degree
    sizes = [units // degree] * (degree - larger) + [size] * larger
    starts = [sum(sizes[:lane]) for lane in range(degree)]
    return tuple(Share(start * unit, (start + own) * unit, (start + size) * unit) for start, own in zip(starts, sizes))


def shared_groups(heads: int, kv_heads: int, degree: int, unit: int = 1) -> bool:
    """True if lanes would have different shares of the heads that read one KV head.

    Then every lane picks the KV head of each of its heads by number.
    """
    if heads % kv_heads:
        return False
    group = heads // kv_heads
    shares = spread(heads, degree, unit)
    whole = all(share.start % group == share.stop % group == 0 for share in shares)
    return not whole and any(share.start // group != (share.stop - 1) // group for share in shares)


def kv_shares(heads: int, kv_heads: int, degree: int, unit: int = 1) -> tuple[tuple[int, int], ...]:
    """The KV heads start..stop that every lane's heads read, equally many on all lanes."""
    group = heads // kv_heads
    ranges = [(share.start // group, (share.stop - 1) // group + 1) for share in spread(heads, degree, unit)]
    size = max(stop - start for start, stop in ranges)
    starts = [min(start, kv_heads - size) for start, _ in ranges]
    return tuple((start, start + size) for start in starts)


def valid_degrees(layers: LayerTable) -> tuple[int, ...]:
    """Every degree that leaves no lane without a head or a column: up to the smallest count of them."""
    most = min((_units(branch) for branch in layers.branches), default=1)
    return tuple(range(1, most + 1))


def even_degrees(layers: LayerTable) -> tuple[int, ...]:
    """The valid degrees that need no padding and no KV head on two lanes with different shares of its heads."""
    return tuple(degree for degree in valid_degrees(layers) if all(_even(degree, branch) for branch in layers.branches))


def smallest_degree(layers: LayerTable) -> int:
    """The smallest even degree above 1, else the smallest valid one, or 1 if there is none."""
    choices = (*even_degrees(layers), *valid_degrees(layers))
    return next((degree for degree in choices if degree > 1), 1)


def padding(layers: LayerTable, degree: int, kind: str) -> float:
    """Heads (kind "attention") or columns ("ffn") that are computed beyond the model's own, as a share of those."""
    branches = [branch for branch in layers.branches if branch.kind == kind]
    padded_count = sum(-(-_units(branch) // degree) * degree * branch.unit for branch in branches)
    return padded_count / max(1, sum(map(count, branches))) - (1 if branches else 0)


def count(branch: Branch) -> int:
    """Number of heads of an attention, or of columns of an FFN: what is divided among the lanes."""
    return branch.columns if branch.kind == "ffn" else branch.heads


def _units(branch: Branch) -> int:
    return count(branch) // branch.unit


def _even(degree: int, branch: Branch) -> bool:
    if _units(branch) % degree:
        return False
    kv_heads = branch.kv_heads or branch.heads
    return branch.kind == "ffn" or not shared_groups(branch.heads, kv_heads, degree, branch.unit)
