"""What an attention mask lets a query see: causal, with a sliding window, with ALiBi slopes, or something else.

A mask that depends on no input is a function of two positions. It is computed for all pairs up to a length, on every
lane, and compared number by number with the rule it seems to follow: nothing is read off the operators that build it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import largest_size
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import token_input
from kraken_compiler.passes.cache.positional_values import constant_of, evaluate, origins
from kraken_compiler.passes.graph_tools import argument, module_path
from kraken_compiler.passes.shapes import shape_of, value_of

_SHORTEST, _LONGEST = 64, 8192
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


def classify_mask(program: Program, attention: fx.Node) -> MaskRule | Rejection:
    """The rule of one attention's mask.

    Args:
        program: A lane program whose only input is its tokens.
        attention: A scaled_dot_product_attention.
    """
    mask = argument(attention, 3, "attn_mask")
    if mask is None:
        return MaskRule() if argument(attention, 5, "is_causal", False) else _no_rule(attention, _NOT_CAUSAL)
    nodes = origins(program, mask)
    stored = [node for node in nodes if node.name in program.weights and constant_of(program, node) is None]
    if any(not value_of(node).is_floating_point() for node in stored):
        return _no_rule(stored[0], "its mask is stored among the weights")
    length, limit = _length(program, nodes)
    # Weights have no values yet: what holds for two random draws holds for any.
    draws = [(lane, seed) for lane in range(_distinct_lanes(program, nodes)) for seed in range(1 + bool(stored))]
    try:
        masks = [evaluate(program, nodes, length, *draw) for draw in draws]
    except RuntimeError as error:
        return _no_rule(attention, f"its mask cannot be computed for {length} tokens ({str(error).splitlines()[0]})")
    rules = set(map(_rule, masks))
    if len(rules) != 1 or None in rules:
        later = any(bool(_allowed(mask).triu(1).any()) for mask in masks)
        return _no_rule(attention, _NOT_CAUSAL if later else _OTHER_RULE)
    (rule,) = rules
    assert rule is not None
    return MaskRule(rule[0], rule[1], limit)


def _length(program: Program, nodes: Iterable[fx.Node]) -> tuple[int, int | None]:
    """How long a sequence must be to show the whole rule, and how far what it shows holds."""
    token = token_input(program)
    assert token is not None
    tokens = next(node for node in program.graph.nodes if node.name == token.name)
    bound = largest_size(shape_of(tokens)[1])
    numbers = {abs(number) for node in nodes for number in _numbers(node.args)}
    wanted = _SHORTEST
    for node in nodes:
        constant = constant_of(program, node)
        if constant is None:
            continue
        if constant.numel() == 1:
            numbers.add(abs(int(constant)) if torch.isfinite(constant.double()).all() else 0)
        elif sum(size > 1 for size in constant.shape) > 1:
            # A stored mask may hold any rule, so all of it is looked at.
            bound = min(bound or _LONGEST, constant.shape[-1])
            wanted = max(wanted, bound)
    small = [number for number in numbers if number + 2 <= _LONGEST]
    large = [number for number in numbers if number + 2 > _LONGEST and number < 2**31 - 1]
    length = min(max(wanted, max(small, default=0) + 2), _LONGEST, bound or _LONGEST)
    limits = [*large, *([bound] if bound else [])]
    return length, min(limits, default=None)


def _numbers(argument_: Any) -> Iterable[int]:
    if isinstance(argument_, (list, tuple)):
        for element in argument_:
            yield from _numbers(element)
    elif isinstance(argument_, (int, float)) and not isinstance(argument_, bool) and abs(argument_) < 2**62:
        yield int(argument_)


def _distinct_lanes(program: Program, nodes: Iterable[fx.Node]) -> int:
    specs = [program.weights[node.name] for node in nodes if node.name in program.weights]
    return program.degree if any(spec.shards for spec in specs) else 1


def _rule(mask: Tensor) -> tuple[int, bool] | None:
    """Window of a mask [..., S, S] and whether it has slopes; None if it follows no such rule."""
    length = mask.shape[-1]
    allowed, bias = _allowed(mask), torch.zeros(mask.shape) if mask.dtype == torch.bool else mask.float()
    allowed, bias = (tensor.reshape(-1, length, length) for tensor in (allowed, bias))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = int(allowed[0, -1].sum())
    expected = (distance >= 0) & (distance < seen)
    if seen == 0 or not bool((allowed == expected).all()):
        return None
    own = bias.diagonal(dim1=-2, dim2=-1)[:, :, None]
    slopes = (own - bias)[:, 1, 0, None, None] if seen > 1 else torch.zeros(len(bias), 1, 1)
    error = torch.where(expected, bias - own + slopes * distance, 0.0).abs().amax((1, 2))
    rounding = 4 * (torch.finfo(mask.dtype).eps if mask.is_floating_point() else 0.0)
    if bool((error > rounding * bias.masked_fill(~expected, 0.0).abs().amax((1, 2))).any()):
        return None
    return (0 if seen == length else seen), bool(slopes.any())


def _allowed(mask: Tensor) -> Tensor:
    """Which key every query sees."""
    # A large negative number stands for minus infinity; how large depends on what the element type holds.
    return mask if mask.dtype == torch.bool else mask > (-5e3 if mask.dtype == torch.float16 else -1e9)


def _no_rule(node: fx.Node, reason: str) -> Rejection:
    return Rejection(reason, (node.name,), module_path(node))
