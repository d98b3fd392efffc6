"""Proofs, by rules on operators, that a mask is linear in positions, in pieces whose borders are known.

    %c = le(%keys, %queries)              two pieces, true and false; they meet where the distance is 0
    %b = mul(%slopes, %distance)          linear, in one piece
    %w = lt(div(%distance, 50), 2.0)      two pieces, which meet at distance 100
    %r = sqrt(%distance)                  not proven

Such a mask has shown every rule that it follows once a sequence reaches a few positions beyond its borders. Rules on
operators say that a value is linear; along which positions, and where borders are, is read off its numbers for a short
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import DEQUANTIZE, MASKED_FILLS, SHAPE_ONLY
from kraken_compiler.passes.cache.compare_lengths import RUN_ERRORS, size_bound
from kraken_compiler.passes.cache.length_independence import (
    ELEMENTS_KEPT,
    RANGES,
    RESHAPES,
    LengthIndependence,
    same_groups,
)
from kraken_compiler.passes.cache.positional_values import evaluate_all
from kraken_compiler.passes.choosing import COMPARISONS, WHERE, is_pointwise
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.shapes import is_tensor, same_size, shape_of, symbols_of, value_of

_SHORT = 8
_BEYOND = 4
"""Positions behind the last border: in every piece are so many that no other linear function goes through them."""

_SUMS = frozenset(
    {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar}
)
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.outer.default})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
_FILLED = SHAPE_ONLY | {aten.zeros.default, aten.ones.default, aten.full.default}
_BENDS = frozenset(
    {aten.abs.default, aten.relu.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}
)
_TRIANGLES = frozenset({aten.tril.default, aten.triu.default})
_SAME_NUMBERS = {aten.neg.default} | ELEMENTS_KEPT - {
    aten.outer.default,
    aten.polar.default,
    aten.complex.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
    DEQUANTIZE,
}
"""Operators after which every number stands at the same positions, whatever the order of the dims."""

_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
"""Element types in which positions are what they are, up to lengths that nobody computes."""


class Form(IntFlag):
    """What a value is as a function of positions, for every choice of its other indices."""

    FIXED = 0
    """The same at all positions."""
    LINEAR = 1
    """Linear in positions, in one piece."""
    STEPS = 2
    """The same all over each of several pieces."""
    PIECES = 3
    """Linear in each of several pieces."""


@dataclass(frozen=True)
class Borders:
    """The borders between the pieces of a mask.

    Attributes:
        positions: Where it changes at a position of queries or of keys.
        distances: Where it changes at a distance between them.
        stored: Number of positions in the shortest table that it is cut from; None if it is computed.
    """

    positions: frozenset[float] = frozenset()
    distances: frozenset[float] = frozenset()
    stored: int | None = None

    def reach(self, longest: int) -> tuple[int, int | None]:
        """The length of a sequence that shows all pieces, and up to which length it does, None for any.

        Args:
            longest: The longest sequence to look at; borders beyond it are limits.
        """
        near = [[border for border in side if border + 2 <= longest] for side in (self.positions, self.distances)]
        far = [int(border) for border in self.positions | self.distances if border + 2 > longest]
        # A piece may lie behind a border of each kind: beyond so many positions and that distance from them.
        length = int(sum(max(side, default=0.0) for side in near)) + _BEYOND
        if length > longest + _BEYOND:
            length = longest
            far.append(longest)
        return length, min([*far, *([self.stored] if self.stored else [])], default=None)


def find_borders(
    program: Program, nodes: Sequence[fx.Node], proofs: LengthIndependence, lanes: Sequence[int]
) -> Borders | None:
    """The borders of a mask on all of some lanes; None if it is not proven to be linear in pieces.

    Args:
        program: A lane program whose only input is its tokens.
        nodes: What `origins` gave for the mask.
        proofs: What is known of the graph's values.
        lanes: Their numbers.
    """
    short = min(_SHORT, size_bound(program) or _SHORT)
    borders = Borders()
    for lane in lanes:
        try:
            values = evaluate_all(program, nodes, short, lane, keep=nodes)
        except RUN_ERRORS:
            return None
        pieces = _Pieces(proofs, values)
        if pieces.form_of(nodes[-1]) is None:
            return None
        borders = Borders(
            borders.positions | pieces.positions,
            borders.distances | pieces.distances,
            min(pieces.stored, default=None),
        )
    return borders


@dataclass
class _Pieces:
    """The forms of a graph's values on one lane, and the borders that were met on the way.

    Attributes:
        proofs: What is known of the graph's values.
        values: Of all nodes, in graph order, for a short sequence.
        forms: Of every node; None where nothing is proven.
        positions, distances: See `Borders`.
        stored: Number of positions in the tables that were cut.
    """

    proofs: LengthIndependence
    values: dict[fx.Node, Any]
    forms: dict[fx.Node, Form | None] = field(default_factory=dict)
    positions: set[float] = field(default_factory=set)
    distances: set[float] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)

    def form_of(self, last: fx.Node) -> Form | None:
        """The form of the last node."""
        for node in self.values:
            form = self._form(node) if is_tensor(node) else None
            self.forms[node] = self._as_stored(node, form)
        return self.forms[last]

    def _form(self, node: fx.Node) -> Form | None:
        shape = shape_of(node)
        growing = self._growing(node)
        symbols = symbols_of(self.proofs.sequence)
        if sum(bool(symbols_of(size) & symbols) for size in shape) != len(growing):
            return None
        if not growing:
            return Form.FIXED if self.proofs.is_steady(node) else None
        if node.target in RANGES:
            return Form.LINEAR
        if node.target in _FILLED:
            return Form.FIXED if self.proofs.is_steady(node) else None
        operands = [self.forms[one] for one in self._operands(node)]
        if None in operands:
            return None
        return self._rule(node)(node)

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], Form | None]:
        """The rule for an operator whose operands' forms are known."""
        rules: dict[Any, Callable[[fx.Node], Form | None]] = {
            aten.slice.Tensor: self._cut,
            aten.repeat.default: self._repeated,
            aten.diff.default: self._difference,
            aten.cumsum.default: self._running_sum,
            aten.index.Tensor: self._indexed,
            aten.index_select.default: self._selected,
            aten.select.int: self._selected,
            **dict.fromkeys(RESHAPES, self._reshaped),
            **dict.fromkeys(_TRIANGLES, self._triangle),
            **dict.fromkeys(COMPARISONS, self._comparison),
            **dict.fromkeys(_SUMS, self._sum),
            **dict.fromkeys((*_PRODUCTS, *_QUOTIENTS), self._product),
            **dict.fromkeys((*WHERE, *MASKED_FILLS), self._joined),
            **dict.fromkeys(_SAME_NUMBERS, self._operand_form),
            **dict.fromkeys(_BENDS, self._bent),
        }
        return rules.get(node.target, self._pointwise)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The tensors whose numbers an operator reads."""
        operands = node.all_input_nodes[:1] if node.target is aten.expand_as.default else node.all_input_nodes
        return [one for one in operands if is_tensor(one)]

    def _growing(self, node: fx.Node) -> list[int]:
        """The dims of a value that are as long as the sequence."""
        return [dim for dim, size in enumerate(shape_of(node)) if same_size(size, self.proofs.sequence)]

    def _operand_form(self, node: fx.Node) -> Form | None:
        return self.forms[args_of(node)[0]]

    def _of(self, value: Any) -> Form:
        """The form of an operand, which has one; numbers are fixed."""
        form = self.forms[value] if isinstance(value, fx.Node) and is_tensor(value) else Form.FIXED
        assert form is not None
        return form

    def _as_stored(self, node: fx.Node, form: Form | None) -> Form | None:
        """The form after a value has been rounded to its element type."""
        if not form or not form & Form.LINEAR:
            return form
        dtype = value_of(node).dtype
        if dtype.is_floating_point:
            return form if dtype in _EXACT else Form.PIECES
        is_rounded = any(value_of(one).is_floating_point() for one in self._operands(node))
        return form if dtype in _EXACT and not is_rounded else None

    def _joined(self, node: fx.Node) -> Form | None:
        """The form of what is taken from one of several values, number by number."""
        form = Form.FIXED
        for value in (*args_of(node), *node.kwargs.values()):
            form |= self._of(value)
        return None if self.proofs.numbers_of_tokens(node) else form

    def _pointwise(self, node: fx.Node) -> Form | None:
        """The form of any function of values that are fixed, perhaps in pieces."""
        form = self._joined(node)
        return form if is_pointwise(node.target) and form is not None and not form & Form.LINEAR else None

    def _sum(self, node: fx.Node) -> Form | None:
        left, right = args_of(node)[:2]
        form = self._of(left) | self._of(right)
        both = bool(self._of(left) & self._of(right) & Form.LINEAR)
        # Rounded numbers of two positions differ by another number everywhere.
        return Form.PIECES if both and not (self._is_whole(left) and self._is_whole(right)) else form

    def _product(self, node: fx.Node) -> Form | None:
        left, right = args_of(node)[:2]
        if self.proofs.numbers_of_tokens(node):
            return None
        if self._of(right) & Form.LINEAR and (self._of(left) & Form.LINEAR or node.target in _QUOTIENTS):
            return None
        return self._of(left) | self._of(right)

    def _comparison(self, node: fx.Node) -> Form | None:
        left, right = args_of(node)[:2]
        form = self._of(left) | self._of(right)
        if not form & Form.LINEAR:
            return self._pointwise(node)
        if form & Form.STEPS or not self.proofs.is_steady(node):
            return None
        if self._of(left) & self._of(right) and not (self._is_whole(left) and self._is_whole(right)):
            return None
        difference = self._number(left) - self._number(right)
        return Form.STEPS if self._add_borders(node, difference.expand_as(self.values[node])) else None

    def _bent(self, node: fx.Node) -> Form | None:
        """The form of a linear value that another one takes over from at some numbers."""
        operand = args_of(node)[0]
        if not self._of(operand) & Form.LINEAR:
            return self._pointwise(node)
        if self._of(operand) & Form.STEPS or not self.proofs.is_steady(node):
            return None
        bounds = [bound for bound in (*args_of(node)[1:], *node.kwargs.values()) if bound is not None] or [0]
        are_known = all(self._add_borders(node, self._number(operand) - bound) for bound in bounds)
        return Form.PIECES if are_known else None

    def _number(self, operand: Any) -> Tensor:
        value = self.values[operand] if isinstance(operand, fx.Node) else operand
        return torch.as_tensor(value).double()

    def _is_whole(self, operand: Any) -> bool:
        number = self._number(operand)
        return torch.equal(number, number.round())

    def _add_borders(self, node: fx.Node, difference: Tensor) -> bool:
        """Note where a linear difference, shaped as a node's value, is 0; False if that is no position or distance."""
        growing = self._growing(node)
        if len(growing) > 2 or min(difference.shape[dim] for dim in growing) < 2:
            return False
        difference = difference.movedim(growing, list(range(-len(growing), 0)))
        if len(growing) == 1:
            difference = difference[..., None].expand(*difference.shape, 2)
        origin = difference[..., 0, 0]
        by_query, by_key = difference[..., 1, 0] - origin, difference[..., 0, 1] - origin
        one_only = (by_query == 0) | (by_key == 0)
        opposite = (by_query + by_key).abs() <= 1e-6 * by_query.abs()
        if not bool((one_only | opposite).all()):
            return False
        self.positions |= _finite((origin / (by_query + by_key))[one_only])
        self.distances |= _finite((origin / by_query)[~one_only])
        return True

    def _triangle(self, node: fx.Node) -> Form | None:
        diagonal = argument(node, 1, "diagonal", 0)
        rank = len(shape_of(node))
        if not isinstance(diagonal, int) or self._growing(node)[-2:] != [rank - 2, rank - 1]:
            return None
        self.distances.add(float(abs(diagonal)))
        form = self._operand_form(node)
        return None if form is None else form | Form.STEPS

    def _cut(self, node: fx.Node) -> Form | None:
        operand = args_of(node)[0]
        dim, start, step = (argument(node, *one) for one in ((1, "dim", 0), (2, "start"), (4, "step", 1)))
        growing = self._growing(operand)
        if growing == self._growing(node):
            is_beginning = (start or 0) == 0 and step == 1
            return self._operand_form(node) if is_beginning or dim % len(shape_of(operand)) not in growing else None
        rows, start = shape_of(operand)[dim], start or 0
        if step != 1 or not isinstance(rows, int) or not isinstance(start, int) or start < 0:
            return None
        # A table that ends somewhere; its numbers are looked at, here where it is cut.
        self.stored.add(rows - start)
        return _along(self.values[operand], dim) if self._of(operand) == Form.FIXED else None

    def _repeated(self, node: fx.Node) -> Form | None:
        operand, repeats = args_of(node)[:2]
        rank = len(shape_of(operand))
        own = repeats[len(repeats) - rank :]
        return self._operand_form(node) if all(own[dim] == 1 for dim in self._growing(operand)) else None

    def _reshaped(self, node: fx.Node) -> Form | None:
        operand = args_of(node)[0]
        same = len(self._growing(operand)) == len(self._growing(node))
        return self._operand_form(node) if same and same_groups(shape_of(operand), shape_of(node)) else None

    def _difference(self, node: fx.Node) -> Form | None:
        """The form of the steps from position to position, the first one from a number given."""
        before = argument(node, 3, "prepend")
        if argument(node, 1, "n", 1) != 1 or not isinstance(before, fx.Node) or self._of(before) != Form.FIXED:
            return None
        if self._operand_form(node) not in (Form.FIXED, Form.LINEAR):
            return None
        self.positions.add(1.0)
        return Form.STEPS

    def _running_sum(self, node: fx.Node) -> Form | None:
        operand, dim = args_of(node)[:2]
        form = self.forms[operand]
        if dim % len(shape_of(operand)) not in self._growing(operand):
            return None
        if form == Form.FIXED:
            return Form.LINEAR
        is_shown = Borders(frozenset(self.positions), frozenset(self.distances)).reach(_SHORT)[0] <= _SHORT
        is_nothing = form == Form.STEPS and is_shown and not bool(self._number(operand).any())
        return Form.FIXED if is_nothing else None

    def _indexed(self, node: fx.Node) -> Form | None:
        """The form of rows that are taken by their own position."""
        table, indices = args_of(node)[:2]
        for dim, index in enumerate(indices):
            if index is None:
                continue
            by_position = dim in self._growing(table)
            if by_position and not torch.equal(self._number(index).flatten(), torch.arange(_SHORT).double()):
                return None
            if self._of(index) != (Form.LINEAR if by_position else Form.FIXED):
                return None
        return self._operand_form(node)

    def _selected(self, node: fx.Node) -> Form | None:
        operand, dim, index = args_of(node)[:3]
        keeps_positions = dim % len(shape_of(operand)) not in self._growing(operand)
        return self._operand_form(node) if keeps_positions and self._of(index) == Form.FIXED else None


def _along(table: Tensor, dim: int) -> Form | None:
    """The form of a table's numbers along a dim, looked at in full."""
    steps = table.double().diff(dim=dim)
    if not bool(steps.any()):
        return Form.FIXED
    return Form.LINEAR if not bool(steps.diff(dim=dim).any()) else None


def _finite(borders: Tensor) -> set[float]:
    """The sizes of those that are numbers: what is 0 everywhere, or nowhere, is no border."""
    return set(borders[torch.isfinite(borders)].abs().tolist())
