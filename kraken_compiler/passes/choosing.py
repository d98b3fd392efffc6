"""Smooth stand-ins for operators that choose, so that gradients tell everything a choice looked at.

A largest element has a gradient to itself only, a comparison and a rounded number have none at all. A probe that goes
by gradients would not see that `h * (h >= h.amax(-1))` needs all of `h`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.passes.graph_tools import aten

COMPARISONS = frozenset(
    overload
    for packet in (aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne)
    for overload in (packet.Tensor, packet.Scalar)
)
WHERE = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
_TAKE_NUMBERS = frozenset({*WHERE, aten.masked_fill.Scalar, aten.mul.Tensor, aten.to.dtype})
"""What takes a number in a condition's place."""


def compare(node: fx.Node, left: Any, right: Any) -> Tensor:
    """A difference instead of a truth value, if all that read it can take a number."""
    smooth = all(user.target in _TAKE_NUMBERS for user in node.users)
    assert callable(node.target)
    result: Tensor = left - right if smooth and left.is_floating_point() else node.target(left, right)
    return result


def _where(condition: Tensor, *options: Any) -> Any:
    if condition.dtype == torch.bool:
        return torch.where(condition, *options)
    return _all_of(condition, *(option for option in options if isinstance(option, Tensor)))


def _masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return x.masked_fill(mask, value) if mask.dtype == torch.bool else _all_of(x, mask)


def _all_of(first: Tensor, *others: Tensor) -> Tensor:
    """A sum; what is infinite masks, and counts nothing."""
    return sum((other.nan_to_num(0.0, 0.0, 0.0) for other in others), first)


def _cast(x: Tensor, dtype: torch.dtype, *rest: Any, **named: Any) -> Tensor:
    return x if dtype == torch.bool and x.is_floating_point() else x.to(dtype)


def _mean(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return x.double().mean(dim or None, keepdim)


def _mean_and_place(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.double().mean(dim, keepdim), x.argmax(dim, keepdim)


def _topk(x: Tensor, k: int, dim: int = -1, *rest: Any) -> tuple[Tensor, Tensor]:
    values, places = x.topk(k, dim, *rest)
    return values + x.double().mean(dim, keepdim=True), places


def _sort(x: Tensor, dim: int = -1, *rest: Any) -> tuple[Tensor, Tensor]:
    values, places = x.sort(dim, *rest)
    return values + x.double().mean(dim, keepdim=True), places


def _rounded(x: Tensor) -> Tensor:
    """Not x itself: in `(x / step).round() * step` the step would cancel out."""
    return x + torch.sin(x) / 2


CHOOSING: dict[Any, Any] = {
    **dict.fromkeys(WHERE, _where),
    aten.masked_fill.Scalar: _masked_fill,
    aten.to.dtype: _cast,
    **dict.fromkeys((aten.amax.default, aten.amin.default), _mean),
    **dict.fromkeys((aten.max.dim, aten.min.dim), _mean_and_place),
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    **dict.fromkeys(
        (aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, aten.sign.default), _rounded
    ),
}
"""Stand-ins by operator; they are given and give float64 where the operator has floating-point numbers."""
