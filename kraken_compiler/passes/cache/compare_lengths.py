"""Comparison at many lengths of what a graph computes from positions alone: whether longer sequences keep its rows.

For what `LengthIndependence` does not prove: the value is computed for many lengths, below and beyond every number that
occurs in the graph, and for several rows; what a longer sequence has in common with a shorter one must be the same.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import largest_size
from kraken_compiler.errors import first_line
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.cache.positional_values import constant_of, draws, evaluate
from kraken_compiler.passes.sample_inputs import token_input
from kraken_compiler.passes.shapes import is_tensor, shape_of, symbols_of, value_of

_LONGEST = 1 << 17
_MOST_ELEMENTS = 1 << 25
_ROWS = 3
RUN_ERRORS = (RuntimeError, IndexError, ValueError)
"""Exceptions that operators raise where stored or learned positions end."""


@dataclass(frozen=True)
class Common:
    """Lengths up to which shorter and longer sequences have the same rows.

    Attributes:
        limit: The longest of them.
        beyond: A longer sequence whose rows differ; None if none that was tried does.
        by_row: True if rows of a batch differ among each other.
    """

    limit: int
    beyond: int | None = None
    by_row: bool = False


def compare_lengths(program: Program, nodes: Sequence[fx.Node]) -> Common | str:
    """Compare the rows of a value at many lengths.

    Args:
        program: A lane program whose only input is its tokens.
        nodes: What `origins` gave for the value.

    Returns:
        What was found, or why nothing could be computed.
    """
    comparisons = []
    for draw in draws(program, nodes):
        comparison = _compare(program, nodes, *draw)
        if isinstance(comparison, str) or comparison.by_row:
            return comparison
        comparisons.append(comparison)
    return min(comparisons, key=lambda comparison: (comparison.beyond is None, comparison.limit))


def lengths_to_try(program: Program, nodes: Sequence[fx.Node], most_elements: int = _MOST_ELEMENTS) -> list[int]:
    """Lengths around every number that occurs in a graph, and around powers of two; ascending, from 2 on.

    Args:
        program: A lane program whose only input is its tokens; lengths are in the bounds that its export proved.
        nodes: The graph.
        most_elements: That any value may have, so that the compile has the memory for it.
    """
    powers = [1 << power for power in range(1, _LONGEST.bit_length())]
    numbers = {*range(2, 19), *(part * power for power in powers for part in (1, 3)), 100, 1000, 10000, 100000}
    numbers |= {int(number * part) for number in numbers_in(program, nodes) for part in (0.5, 1, 2)}
    around = {number + step for number in numbers for step in (-1, 0, 1, 2)}
    bound = min(_LONGEST, size_bound(program) or _LONGEST)
    lengths = sorted(length for length in around | {bound} if 2 <= length <= bound)
    count = bisect.bisect_right(lengths, most_elements, key=lambda length: _elements(program, nodes, length))
    return lengths[: max(count, 2)]


def longest_within(program: Program, nodes: Sequence[fx.Node], most_bytes: int, longest: int) -> int:
    """The longest sequence, up to a given one, at which no value of a graph takes more than some bytes.

    Args:
        program: A lane program whose only input is its tokens.
        nodes: The graph.
        most_bytes: Of memory.
        longest: The longest sequence to consider.
    """
    return bisect.bisect_right(
        range(1, longest + 1), most_bytes, key=lambda length: _elements(program, nodes, length, in_bytes=True)
    )


def numbers_in(program: Program, nodes: Iterable[fx.Node]) -> set[int]:
    """The numbers among the arguments of operators and the values of small constants, as whole ones, without signs."""
    numbers: set[int] = set()
    for node in nodes:
        numbers |= {abs(number) for number in _numbers((*node.args, *node.kwargs.values()))}
        constant = constant_of(program, node)
        if constant is not None and constant.numel() == 1 and bool(torch.isfinite(constant.double()).all()):
            numbers.add(abs(int(constant)))
    return numbers


def size_bound(program: Program) -> int | None:
    """The longest sequence that the export allows; None if it proved no bound."""
    return largest_size(shape_of(_tokens(program))[1])


def _tokens(program: Program) -> fx.Node:
    token = token_input(program)
    assert token is not None
    tokens: fx.Node = next(node for node in program.graph.nodes if node.name == token.name)
    return tokens


def _numbers(argument: Any) -> Iterator[int]:
    if isinstance(argument, (list, tuple)):
        for element in argument:
            yield from _numbers(element)
    elif isinstance(argument, (int, float)) and not isinstance(argument, bool) and abs(argument) < 2**62:
        yield int(argument)


def _elements(program: Program, nodes: Sequence[fx.Node], length: int, *, in_bytes: bool = False) -> int:
    """Elements of the largest value at a length, or bytes; every other size of unknown number counts as one row."""
    (sequence,) = symbols_of(shape_of(_tokens(program))[1]) or (None,)
    sizes = [
        (*shape_of(node), value_of(node).element_size()) if in_bytes else shape_of(node)
        for node in nodes
        if is_tensor(node)
    ]
    numbers = {symbol: 1 for shape in sizes for size in shape for symbol in symbols_of(size)} | {sequence: length}

    def number(size: Any) -> int:
        return int(size.node.expr.xreplace(numbers)) if symbols_of(size) else int(size)

    return max(math.prod(map(number, shape)) for shape in sizes)


def _compare(program: Program, nodes: Sequence[fx.Node], lane: int, seed: int) -> Common | str:
    def compute(length: int, batch: int = 1) -> Tensor:
        return evaluate(program, nodes, length, lane, seed, batch)

    lengths = lengths_to_try(program, nodes)
    try:
        first = before = compute(lengths[0])
        rows = compute(lengths[0], _ROWS)
    except RUN_ERRORS as error:
        return f"it cannot be computed for {lengths[0]} tokens ({first_line(error)})"
    if not same_beginning(before.expand_as(rows) if before.dim() == rows.dim() else before, rows):
        return Common(lengths[0], by_row=True)
    for shorter, longer in itertools.pairwise(lengths):
        try:
            after = compute(longer)
        except RUN_ERRORS:
            # Learned and stored positions end somewhere, which only running into it shows.
            return Common(shorter)
        if not same_beginning(before, after) or not same_beginning(first, after):
            return Common(_last_same(compute, shorter, longer), longer)
        before = after
    return Common(lengths[-1])


def _last_same(compute: Callable[[int], Tensor], same: int, other: int) -> int:
    """The longest length that has the rows of `same`, between it and one that does not have them."""
    reference = compute(same)
    while other - same > 1:
        middle = (same + other) // 2
        if same_beginning(reference, compute(middle)):
            same = middle
        else:
            other = middle
    return same


def same_beginning(one: Tensor, other: Tensor) -> bool:
    """True if two tensors agree at all indices that both have, but for rounding."""
    if one.dim() != other.dim() or one.dtype != other.dtype:
        return False
    common = tuple(slice(min(left, right)) for left, right in zip(one.shape, other.shape))
    left, right = one[common], other[common]
    # The same bits, as nearly always, need none of what follows, which takes ten times as long.
    same_bits = torch.equal(left, right)
    if same_bits or not (left.is_floating_point() or left.is_complex()):
        return same_bits
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    # How the numbers at the end of a tensor are rounded depends on where it ends.
    rounding = torch.finfo(left.dtype).eps * (8 if left.dtype in (torch.float32, torch.float64) else 1)
    left, right = left.double(), right.double()
    finite = torch.isfinite(left) & torch.isfinite(right)
    same = torch.where(finite, True, (left == right) | (left.isnan() & right.isnan()))
    left, right = torch.where(finite, left, 0), torch.where(finite, right, 0)
    size = torch.maximum(left.abs(), right.abs())
    floor = size.max().clamp(max=1.0) if size.numel() else torch.zeros(())
    return bool((same & ((left - right).abs() <= rounding * torch.maximum(size, floor))).all())
