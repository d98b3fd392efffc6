"""`kraken::dequantize`: the weight that small integers, their scales and their zero points stand for.

    weight[o, i] = (data[o, i] - zero_point[o, g]) * scale[o, g]          g = i // (I / G)

All operands of it can be cut alike: rows anywhere, columns where a group ends. It is written in plain operators, so
vmap, compilers and exporters see those.

Legend: O rows (what a linear gives), I columns (what it sums over), G groups of a row that have a scale of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("kraken", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("dequantize(Tensor data, Tensor scale, Tensor? zero_point, int bits, ScalarType dtype) -> Tensor")


def dequantize(data: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Compute the weight.

    Args:
        data: int8 [O, I], or two integers a byte [O, I / 2], see `pack`.
        scale: [O, G], G divides I.
        zero_point: [O, G] of any type; None means 0.
        bits: Of an integer, 8 or 4.
        dtype: Of the result.

    Returns:
        [O, I].
    """
    # Halves are multiplied before they are put together: compilers have fast code for that, and none for bytes.
    parts = []
    for integers in (data,) if bits == 8 else _halves(data):
        part_OGS = integers.reshape(*scale.shape, -1).to(scale.dtype)
        if zero_point is not None:
            part_OGS = part_OGS - zero_point.unsqueeze(-1)
        parts.append(part_OGS * scale.unsqueeze(-1))
    weight = parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1)
    return weight.flatten(scale.dim() - 1).to(dtype)


_library.impl("dequantize", dequantize, "CompositeImplicitAutograd")


def pack(integers: Tensor) -> Tensor:
    """Integers from -8 to 7, two to a byte, the first in its lower half: int8 [..., I] -> int8 [..., I / 2].

    Both are two's complements, so that a byte of zeros, with which lanes are padded, holds two zeros.
    """
    return (integers[..., ::2] & 15) | (integers[..., 1::2] << 4)


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second integer of every byte; shifting right copies the sign."""
    return (packed << 4) >> 4, packed >> 4


def unpack(packed: Tensor) -> Tensor:
    """Unpack the integers that `pack` packed, two from every byte."""
    return torch.stack(_halves(packed), dim=-1).flatten(-2)


def grain(columns: int, groups: int, bits: int) -> int:
    """Number of columns that stay together when columns are divided: those of a scale, and those of a byte."""
    return math.lcm(columns // groups if groups > 1 else 1, 8 // bits)
