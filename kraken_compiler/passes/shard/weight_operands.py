"""The part of an operand that the part of a computed weight is made of.

    part of select(%stack, 0, 3)         ->     select(part of %stack, 0, 3)
    part of slice(%fused, 0, 64, 128)    ->     part of %fused, 64 further on
    part of to(%w, float32)              ->     to(part of %w, float32)

Lanes then hold no more of the operand than they need. Only operators that leave zeros zeros are looked through: lanes
of unequal width are padded with them.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from kraken_compiler.ir.shards import Kept, KeptDim
from kraken_compiler.passes.graph_tools import args_of, argument, aten

CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})
"""Operators that may round."""

_FACTORS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})


@dataclass(frozen=True)
class OperandPart:
    """A part of an operand, and the call that makes a part of the weight from it; without a target it is that part.

    Attributes:
        operand: The operand.
        kept_sets: The part of it.
        target: What is called with the part and `rest`.
        rest: The other positional arguments.
        kwargs: The named ones.
    """

    operand: fx.Node
    kept_sets: Kept
    target: Any = None
    rest: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


def operand_part(node: fx.Node, kept_sets: Kept, shapes: Mapping[str, tuple[Any, ...]]) -> OperandPart | None:
    """The part of an operand that `kept_sets` of `node` is made of; None if it takes more of it than a part.

    Args:
        node: A tensor computed from one other.
        kept_sets: The part.
        shapes: Shapes of whole tensors, by node name.
    """
    args = args_of(node)
    if node.target in CASTS or node.target is aten.neg.default or (node.target in _FACTORS and _is_factor(args[1])):
        return OperandPart(args[0], kept_sets, node.target, args[1:], node.kwargs)
    if node.target is aten.select.int:
        dim = int(args[1]) % (len(kept_sets) + 1)
        return OperandPart(args[0], (*kept_sets[:dim], None, *kept_sets[dim:]), aten.select.int, (dim, args[2]))
    if node.target is aten.slice.Tensor and argument(node, 4, "step", 1) == 1:
        dim = int(argument(node, 1, "dim", 0)) % len(kept_sets)
        bounds = argument(node, 2, "start"), argument(node, 3, "end")
        if not any(isinstance(bound, fx.Node) for bound in bounds) and isinstance(shapes[args[0].name][dim], int):
            start, stop, _ = slice(*bounds).indices(shapes[args[0].name][dim])
            return _range(args[0], kept_sets, dim, start, stop)
    if node.target is operator.getitem:
        return _piece(args[0], int(args[1]), kept_sets, shapes)
    return None


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value != 0


def _piece(split: fx.Node, number: int, kept_sets: Kept, shapes: Mapping[str, tuple[Any, ...]]) -> OperandPart | None:
    """One of the tensors that an operator cuts its operand into."""
    operand = args_of(split)[0]
    if split.target is aten.unbind.int:
        dim = int(argument(split, 1, "dim", 0)) % (len(kept_sets) + 1)
        return OperandPart(operand, (*kept_sets[:dim], None, *kept_sets[dim:]), aten.select.int, (dim, number))
    if split.target not in _SPLITS:
        return None
    dim = int(argument(split, 2, "dim", 0)) % len(kept_sets)
    lengths = [int(piece.shape[dim]) for piece in split.meta["val"]]
    start, stop = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))[number]
    return _range(operand, kept_sets, dim, start, stop)


def _range(operand: fx.Node, kept_sets: Kept, dim: int, start: int, stop: int) -> OperandPart:
    """Positions `start` to `stop` of a dim, of which lanes keep a part."""
    lanes = kept_sets[dim]
    if lanes is None:
        return OperandPart(operand, kept_sets, aten.slice.Tensor, (dim, start, stop))
    operand_lanes: KeptDim = tuple(tuple((first + start, last + start) for first, last in lane) for lane in lanes)
    return OperandPart(operand, (*kept_sets[:dim], operand_lanes, *kept_sets[dim + 1 :]))
