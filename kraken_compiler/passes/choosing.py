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
UNTAGGED_POINTWISE = frozenset(WHERE) | {
    getattr(packet, kind) for packet in (aten.__and__, aten.__or__, aten.__xor__) for kind in ("Tensor", "Scalar")
}
"""Pointwise, but not all are tagged so."""


def is_pointwise(target: Any) -> bool:
    """True for an operator of torch's whose result has at every place what it makes of the numbers there."""
    return target in UNTAGGED_POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ())


_TAKE_NUMBERS = frozenset({*WHERE, aten.masked_fill.Scalar, aten.mul.Tensor, aten.to.dtype})
"""Operators that take a number in a condition's place."""


def compare(node: fx.Node, left: Any, right: Any) -> Tensor:
    """A difference instead of a truth value, if all that read it can take a number."""
    smooth = all(user.target in _TAKE_NUMBERS for user in node.users)
    assert callable(node.target)
    result: Tensor = left - right if smooth and left.is_floating_point() else node.target(left, right)
    return result


def _where(condition: Tensor, *options: Any) -> Any:
    tensors = [option for option in options if isinstance(option, Tensor)]
    if condition.dtype != torch.bool:
        return _all_of(condition, *tensors)
    if not all(option.is_floating_point() for option in tensors):
        return torch.where(condition, *options)
    return _all_of(torch.zeros(condition.shape, dtype=torch.float64), *tensors)


def _masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return _all_of(x, torch.zeros(mask.shape, dtype=torch.float64) if mask.dtype == torch.bool else mask)


def _all_of(first: Tensor, *others: Tensor) -> Tensor:
    """A sum; what is huge or infinite masks, and counts nothing."""
    return sum((torch.where(other.abs() < _HUGE, other, 0.0) for other in others), first)


_HUGE = 1e6


def _cast(x: Tensor, dtype: torch.dtype, *rest: Any, **options: Any) -> Tensor:
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


def _round(x: Tensor) -> Tensor:
    """A smooth stand-in for rounding. Not x itself: in `(x / step).round() * step` the step would cancel out."""
    return x + torch.sin(x) / 2


def _sum(x: Tensor, other: Tensor) -> Tensor:
    return x + other


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """Channels are dim 1."""
    channels = weight.reshape([1, -1] + [1] * (x.dim() - 2)) if weight.numel() > 1 else weight
    return x + x * torch.sigmoid(x) * channels


LOOKUPS: dict[Any, tuple[int, int]] = {
    aten.embedding.default: (0, 1),
    aten.index.Tensor: (0, 1),
    aten.index_select.default: (0, 2),
    aten.gather.default: (0, 2),
}
"""Operators that pick elements by number: which arguments are the elements, and which the numbers."""


def lookup(node: fx.Node, args: Any, kwargs: Any) -> Tensor:
    """The elements picked by numbers that are computed, plus a mean: all that could have been picked is needed."""
    assert callable(node.target)
    elements, numbers = LOOKUPS[node.target]
    table: Tensor = args[elements]
    # Computed from random numbers, they may lie anywhere.
    args = (*args[:numbers], _in_range(node, table, args), *args[numbers + 1 :])
    result: Tensor = node.target(*args, **kwargs)
    if not result.is_floating_point():
        return result
    if node.target is aten.embedding.default:
        return result + table.mean(0)
    if node.target is aten.index_select.default:
        return result + table.mean(args[1], keepdim=True)
    return result + table.mean()


def _in_range(node: fx.Node, table: Tensor, args: Any) -> Any:
    if node.target is aten.index.Tensor:
        several = enumerate(args[1])
        return [one if one is None or one.dtype == torch.bool else one % table.shape[dim] for dim, one in several]
    dim = 0 if node.target is aten.embedding.default else args[1]
    return args[LOOKUPS[node.target][1]] % table.shape[dim]


CHOOSING: dict[Any, Any] = {
    **dict.fromkeys(WHERE, _where),
    aten.masked_fill.Scalar: _masked_fill,
    aten.to.dtype: _cast,
    **dict.fromkeys((aten.amax.default, aten.amin.default), _mean),
    **dict.fromkeys((aten.max.dim, aten.min.dim), _mean_and_place),
    **dict.fromkeys((aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default), _sum),
    aten.prelu.default: _prelu,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    **dict.fromkeys(
        (aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, aten.sign.default), _round
    ),
    **dict.fromkeys(
        (aten.threshold.default, aten.softshrink.default, aten.hardshrink.default), lambda x, *bounds: _round(x)
    ),
}
"""Stand-ins by operator; they are given and give float64 where the operator has floating-point numbers."""
