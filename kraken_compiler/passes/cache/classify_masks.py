"""Classification of what a mask lets a query see: causal, with a sliding window, with ALiBi slopes, or another.

A mask that depends on no input is a function of two positions, and perhaps of how many there are. It is computed for
all pairs up to a length, on every lane, and compared number by number with the rule it seems to follow: no rule is read
off the operators that build it. Where these prove that a longer sequence shows nothing new, that length is a little
beyond what does (`linear_pieces.py`), and the rule holds at any; else it is the longest affordable one, and a limit.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection, first_line
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.cache.compare_lengths import (
    RUN_ERRORS,
    lengths_to_try,
    longest_within,
    same_beginning,
    size_bound,
)
from kraken_compiler.passes.cache.length_independence import LengthIndependence
from kraken_compiler.passes.cache.linear_pieces import find_borders
from kraken_compiler.passes.cache.positional_values import constant_of, deciding_weight, draws, evaluate, origins
from kraken_compiler.passes.graph_tools import argument, module_path

_SHORTEST, _LONGEST = 64, 8192
_MOST_ELEMENTS = 1 << 21
"""Number of elements of a mask that is computed for many lengths."""
_MOST_BYTES = 1 << 27
"""Memory for the largest value of a mask that is computed for the longest affordable sequence."""
_NOT_CAUSAL = "its attention is not causal: tokens see what follows them, as in an encoder"
_STORED = "its mask depends on numbers that are stored among the weights"
_OTHER_RULE = "its mask is not causal with at most a sliding window and ALiBi slopes"


@dataclass(frozen=True)
class MaskRule:
    """Query i sees key j if 0 <= i - j < window, with slope * (j - i) added to the score.

    Attributes:
        window: Number of positions seen, the query's own included; 0 means all.
        slopes: True if there are ALiBi slopes (Press et al., arXiv 2108.12409), one per head, 0 for none.
        limit: Longest sequence for which the rule is proven or was seen; None if it holds for any.
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
    guilty = deciding_weight(program, nodes)
    if guilty is not None:
        return _no_rule(guilty, _STORED)
    length, limit = _length(program, nodes, proofs)
    rules = _rules_at(program, attention, nodes, length)
    if isinstance(rules, Rejection):
        shorter = _longest_over_pairs(program, nodes, length)
        if shorter in (0, length):
            return rules
        length = limit = shorter
        rules = _rules_at(program, attention, nodes, length)
    if isinstance(rules, Rejection):
        return rules
    if any(rule.window != rules[0].window or bool(rule.slopes.any()) != _has_slopes(rules) for rule in rules):
        return _no_rule(attention, _OTHER_RULE)
    if proofs.may_differ_by_row(mask) and _differs_by_row(program, nodes):
        return _no_rule(attention, "its mask differs between the rows of a batch")
    if not proofs.is_shifted(mask):
        affordable_lengths = lengths_to_try(program, nodes, most_elements=_MOST_ELEMENTS)
        lengths = [shorter for shorter in affordable_lengths if shorter <= length] or [length]
        other_length = _differing_length(program, attention, nodes, rules, lengths)
        if other_length is not None:
            reason = "its mask depends on the total length"
            return _no_rule(
                proofs.culprit(mask), f"{reason}: it is another with {other_length} tokens than with {length}"
            )
        limit = lengths[-1]
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
            if isinstance(rule, Rejection) or not rule.agrees(reference):
                return length
    return None


def _differs_by_row(program: Program, nodes: Sequence[fx.Node]) -> bool:
    one, several = (evaluate(program, nodes, 5, 0, batch=batch) for batch in (1, 3))
    return not same_beginning(one.expand_as(several), several)


def _rules_at(
    program: Program, attention: fx.Node, nodes: Sequence[fx.Node], length: int
) -> list[_LengthRule] | Rejection:
    """The rule of a mask of one length in every draw."""
    rules: list[_LengthRule] = []
    for draw in draws(program, nodes):
        rule = _rule_at(program, attention, nodes, length, draw)
        if isinstance(rule, Rejection):
            return rule
        rules.append(rule)
    return rules


def _rule_at(
    program: Program, attention: fx.Node, nodes: Sequence[fx.Node], length: int, draw: tuple[int, int]
) -> _LengthRule | Rejection:
    try:
        mask = evaluate(program, nodes, length, *draw)
    except RUN_ERRORS as error:
        return _no_rule(attention, f"its mask cannot be computed for {length} tokens ({first_line(error)})")
    if any(size not in (1, length) for size in mask.shape[-2:]):
        return _no_rule(attention, f"its mask is not over pairs of tokens: for {length} it is {list(mask.shape)}")
    mask = mask.expand(*mask.shape[:-2], length, length)
    return _rule(mask) or _no_rule(attention, _difference(mask))


def _length(program: Program, nodes: Sequence[fx.Node], proofs: LengthIndependence) -> tuple[int, int | None]:
    """The length of a sequence that shows the whole rule, and the length up to which that rule holds."""
    lanes = sorted({lane for lane, _ in draws(program, nodes)})
    borders = find_borders(program, nodes, proofs, lanes) if proofs.is_shifted(nodes[-1]) else None
    bounds = [bound for bound in (size_bound(program), borders and borders.stored) if bound]
    if borders is None:
        # A stored mask may hold any rule, so all of it is looked at.
        stored = [constant.shape[-1] for constant in _stored_masks(program, nodes)]
        longest = _LONGEST if stored else longest_within(program, nodes, _MOST_BYTES, _LONGEST)
        length = min([longest, *bounds, *stored])
        return length, length
    length, limit = borders.reach(_LONGEST)
    bounds += [limit] if limit is not None else []
    return min([max(length, _SHORTEST), *bounds]), min(bounds, default=None)


def _longest_over_pairs(program: Program, nodes: Sequence[fx.Node], longest: int) -> int:
    """The longest sequence, up to a given one, that has a mask over pairs of its tokens: stored positions end."""
    if _is_over_pairs(program, nodes, longest):
        return longest
    lengths = range(1, longest + 1)
    return bisect.bisect_left(lengths, True, key=lambda length: not _is_over_pairs(program, nodes, length))


def _is_over_pairs(program: Program, nodes: Sequence[fx.Node], length: int) -> bool:
    try:
        shape = evaluate(program, nodes, length, 0).shape
    except RUN_ERRORS:
        return False
    return all(size in (1, length) for size in shape[-2:])


def _stored_masks(program: Program, nodes: Sequence[fx.Node]) -> list[Tensor]:
    constants = (constant_of(program, node) for node in nodes)
    return [one for one in constants if one is not None and sum(size > 1 for size in one.shape) > 1]


def _rule(mask: Tensor) -> _LengthRule | None:
    """The rule of a mask [..., S, S]; None if it follows no such rule."""
    length = mask.shape[-1]
    visible = _visible_keys(mask).reshape(-1, length, length)
    positions = torch.arange(length, dtype=torch.int32)
    distance = positions[:, None] - positions
    window = int(visible[0, -1].sum())
    window_mask = (distance >= 0) & (distance < window)
    if window == 0 or not bool((visible == window_mask).all()):
        return None
    shown_window = 0 if window == length else window
    if mask.dtype == torch.bool:
        return _LengthRule(shown_window, torch.zeros(len(visible)), length)
    eps = max(torch.finfo(dtype).eps for dtype in (mask.dtype, torch.float32))
    slopes = _slopes(mask.float().reshape(-1, length, length), window_mask, distance, eps)
    return None if slopes is None else _LengthRule(shown_window, slopes, length)


def _slopes(bias: Tensor, window_mask: Tensor, distance: Tensor, eps: float) -> Tensor | None:
    """What one step of distance adds to a score, one per head; None if it is not the same everywhere.

    Args:
        bias: [heads, S, S].
        window_mask: The keys that every query sees, [S, S].
        distance: From key to query, [S, S].
        eps: The rounding of the mask's element type, or of ours.
    """
    diagonal = bias.diagonal(dim1=-2, dim2=-1)[:, :, None]
    has_distance = bool(window_mask[1:].diagonal().any())
    slopes = (diagonal - bias)[:, 1, 0, None, None] if has_distance else torch.zeros(len(bias), 1, 1)
    error = torch.where(window_mask, bias - diagonal + slopes * distance, 0.0).abs().amax((1, 2))
    if bool((error > 4 * eps * bias.masked_fill(~window_mask, 0.0).abs().amax((1, 2))).any()):
        return None
    return slopes.flatten()


def _difference(mask: Tensor) -> str:
    """The way in which a mask [..., S, S] is not the one that a KV cache needs."""
    sees_what_follows = _visible_keys(mask).triu(1)
    if not bool(sees_what_follows.any()):
        return _OTHER_RULE
    if mask.dtype == torch.bool:
        return _NOT_CAUSAL
    behind = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    highest_behind, lowest_before = mask[..., behind].max(), mask[..., ~behind].min()
    if not -torch.inf < highest_behind < min(0.0, float(lowest_before)):
        return _NOT_CAUSAL
    return f"its mask adds {highest_behind:g} to the scores of tokens that follow, which may not hide them"


def _visible_keys(mask: Tensor) -> Tensor:
    """The keys that every query sees, as booleans."""
    # A large negative number stands for minus infinity; how large depends on what the element type holds.
    return mask if mask.dtype == torch.bool else mask > (-5e3 if mask.dtype == torch.float16 else -1e9)


def _no_rule(node: fx.Node, reason: str) -> Rejection:
    return Rejection(reason, (node.name,), module_path(node))
