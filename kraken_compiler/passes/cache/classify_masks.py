"""Classification of what a mask lets a query see: causal, with a sliding window, with ALiBi slopes, or another.

A mask that depends on no input is a function of two positions, and perhaps of how many there are. It is computed for
all pairs up to a length, on every lane, and compared number by number with the rule it seems to follow: nothing is read
off the operators that build it. That it follows the same rule at every length is proven, or computed for many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection, first_line
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.cache.compare_lengths import lengths_to_try, numbers_in, same_beginning, size_bound
from kraken_compiler.passes.cache.length_independence import LengthIndependence
from kraken_compiler.passes.cache.positional_values import constant_of, draws, evaluate, origins, stored_weights
from kraken_compiler.passes.graph_tools import argument, module_path
from kraken_compiler.passes.shapes import value_of

_SHORTEST, _LONGEST = 64, 8192
_MOST_ELEMENTS = 1 << 21
"""Number of elements of a mask that is computed for many lengths."""
_NOT_CAUSAL = "its attention is not causal: tokens see what follows them, as in an encoder"
_OTHER_RULE = "its mask is not causal with at most a sliding window and ALiBi slopes"


@dataclass(frozen=True)
class MaskRule:
    """Query i sees key j if 0 <= i - j < window, with slope * (j - i) added to the score.

    Attributes:
        window: Number of positions seen, the query's own included; 0 means all.
        slopes: True if there are ALiBi slopes (Press et al., arXiv 2108.12409), one per head, 0 for none.
        limit: Longest sequence for which the rule is proven; None if nothing in the graph bounds it.
    """

    window: int = 0
    slopes: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class _LengthRule:
    """The rule of one mask of one length.

    Attributes:
        window: See `MaskRule`; 0 also where the sequence is too short to show one.
        slopes: One per head.
        length: Of the sequence.
    """

    window: int
    slopes: Tensor
    length: int

    def agrees(self, other: _LengthRule) -> bool:
        """True if one rule explains both."""
        longer, shorter = (self, other) if self.length >= other.length else (other, self)
        same_window = longer.window == shorter.window or (not shorter.window and longer.window >= shorter.length)
        scale = torch.maximum(longer.slopes.abs(), shorter.slopes.abs())
        same_slopes = (longer.slopes - shorter.slopes).abs() <= 1e-3 * scale
        # What one step of distance adds is not seen where there is only one position.
        return same_window and (bool(same_slopes.all()) or min(shorter.length, shorter.window or 2) < 2)


def classify_mask(program: Program, attention: fx.Node, proofs: LengthIndependence) -> MaskRule | Rejection:
    """The rule of one attention's mask.

    Args:
        program: A lane program whose only input is its tokens.
        attention: A scaled_dot_product_attention.
        proofs: What is known of the graph's values.
    """
    mask = argument(attention, 3, "attn_mask")
    if mask is None:
        return MaskRule() if argument(attention, 5, "is_causal", False) else _no_rule(attention, _NOT_CAUSAL)
    nodes = origins(program, mask)
    whole_numbers = [node for node in stored_weights(program, nodes) if not value_of(node).is_floating_point()]
    if whole_numbers:
        return _no_rule(whole_numbers[0], "its mask is stored among the weights")
    length, limit = _length(program, nodes)
    rules: list[_LengthRule] = []
    for draw in draws(program, nodes):
        rule = _rule_at(program, attention, nodes, length, draw)
        if isinstance(rule, Rejection):
            return rule
        rules.append(rule)
    if any(rule.window != rules[0].window or bool(rule.slopes.any()) != _has_slopes(rules) for rule in rules):
        return _no_rule(attention, _OTHER_RULE)
    if proofs.may_differ_by_row(mask) and _differs_by_row(program, nodes):
        return _no_rule(attention, "its mask differs between the rows of a batch")
    if not proofs.is_shifted(mask):
        lengths = lengths_to_try(program, nodes, most_elements=_MOST_ELEMENTS)
        other_length = _differing_length(program, attention, nodes, rules, lengths)
        if other_length is not None:
            reason = "its mask depends on the total length"
            return _no_rule(
                proofs.culprit(mask), f"{reason}: it is another with {other_length} tokens than with {length}"
            )
    return MaskRule(rules[0].window, _has_slopes(rules), limit)


def _has_slopes(rules: Sequence[_LengthRule]) -> bool:
    return bool(rules[0].slopes.any())


def _differing_length(
    program: Program,
    attention: fx.Node,
    nodes: Sequence[fx.Node],
    references: Sequence[_LengthRule],
    lengths: Sequence[int],
) -> int | None:
    """One of `lengths` at which a mask follows another rule than its reference; None if there is none."""
    for draw, reference in zip(draws(program, nodes), references, strict=True):
        for length in lengths:
            rule = _rule_at(program, attention, nodes, length, draw)
            if isinstance(rule, Rejection) and length > reference.length:
                break  # stored positions end here
            if isinstance(rule, Rejection) or not rule.agrees(reference):
                return length
    return None


def _differs_by_row(program: Program, nodes: Sequence[fx.Node]) -> bool:
    one, several = (evaluate(program, nodes, 5, 0, batch=batch) for batch in (1, 3))
    return not same_beginning(one.expand_as(several), several)


def _rule_at(
    program: Program, attention: fx.Node, nodes: Sequence[fx.Node], length: int, draw: tuple[int, int]
) -> _LengthRule | Rejection:
    try:
        mask = evaluate(program, nodes, length, *draw)
    except RuntimeError as error:
        return _no_rule(attention, f"its mask cannot be computed for {length} tokens ({first_line(error)})")
    rule = _rule(mask)
    if rule is None:
        return _no_rule(attention, _NOT_CAUSAL if bool(_visible_keys(mask).triu(1).any()) else _OTHER_RULE)
    return rule


def _length(program: Program, nodes: Sequence[fx.Node]) -> tuple[int, int | None]:
    """The length of a sequence that shows the whole rule, and the length up to which that rule holds."""
    bound = size_bound(program)
    numbers = numbers_in(program, nodes)
    shortest = _SHORTEST
    for node in nodes:
        constant = constant_of(program, node)
        if constant is not None and sum(size > 1 for size in constant.shape) > 1:
            # A stored mask may hold any rule, so all of it is looked at.
            bound = min(bound or _LONGEST, constant.shape[-1])
            shortest = max(shortest, bound)
    small = [number for number in numbers if number + 2 <= _LONGEST]
    large = [number for number in numbers if number + 2 > _LONGEST and number < 2**31 - 1]
    length = min(max(shortest, max(small, default=0) + 2), _LONGEST, bound or _LONGEST)
    limits = [*large, *([bound] if bound else [])]
    return length, min(limits, default=None)


def _rule(mask: Tensor) -> _LengthRule | None:
    """The rule of a mask [..., S, S]; None if it follows no such rule."""
    length = mask.shape[-1]
    visible, bias = _visible_keys(mask), torch.zeros(mask.shape) if mask.dtype == torch.bool else mask.float()
    visible, bias = (tensor.reshape(-1, length, length) for tensor in (visible, bias))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    window = int(visible[0, -1].sum())
    window_mask = (distance >= 0) & (distance < window)
    if window == 0 or not bool((visible == window_mask).all()):
        return None
    diagonal = bias.diagonal(dim1=-2, dim2=-1)[:, :, None]
    slopes = (diagonal - bias)[:, 1, 0, None, None] if window > 1 else torch.zeros(len(bias), 1, 1)
    error = torch.where(window_mask, bias - diagonal + slopes * distance, 0.0).abs().amax((1, 2))
    rounding = 4 * (torch.finfo(mask.dtype).eps if mask.is_floating_point() else 0.0)
    if bool((error > rounding * bias.masked_fill(~window_mask, 0.0).abs().amax((1, 2))).any()):
        return None
    return _LengthRule(0 if window == length else window, slopes.flatten(), length)


def _visible_keys(mask: Tensor) -> Tensor:
    """The keys that every query sees, as booleans."""
    # A large negative number stands for minus infinity; how large depends on what the element type holds.
    return mask if mask.dtype == torch.bool else mask > (-5e3 if mask.dtype == torch.float16 else -1e9)


def _no_rule(node: fx.Node, reason: str) -> Rejection:
    return Rejection(reason, (node.name,), module_path(node))
