"""Inputs to check a program with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.calls import DECODER_IDS
from kraken_compiler.ir.program import InputSpec, Program
from kraken_compiler.ir.size_rules import broken_rule
from kraken_compiler.ops.op_sets import EMBEDDING, LANE_EMBEDDING
from kraken_compiler.passes.choosing import COMPARISONS
from kraken_compiler.passes.position_lookups import longest_sequence, lookups

NO_LIMIT = 1 << 30
"""More positions than anybody asks for."""

_LOOKUPS = (EMBEDDING, LANE_EMBEDDING)

_RESHAPES = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("view", "reshape", "_unsafe_view", "unsqueeze", "expand", "alias", "contiguous", "clone", "_to_copy")
)
"""Operators that a model may apply to token ids before it looks them up (GPT-2 flattens them)."""


def sample_inputs(
    program: Program, batch: int, sequence: int, seed: int = 0, *, padded: bool = False, flags: bool = True
) -> dict[str, Tensor]:
    """Random inputs of a given batch and sequence size.

    Whole numbers that index an embedding are drawn from its rows; other whole numbers and flags are ones, as in a mask.

    Args:
        program: The program, before or after lowering.
        batch, sequence: Sizes for the program's symbolic dims; fixed dims keep theirs.
        seed: Seed of the random numbers.
        padded: Have what may be a mask end in zeros, more of them in every row, and have among the token ids those that
            the model compares ids with: padding is more than a number there.
        flags: What flags are; padding is the other.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = all_sizes(program, batch, sequence) or {"batch": batch, "sequence": sequence}
    inputs = {}
    for spec in program.inputs:
        shape = [sizes.get(size, sequence) if isinstance(size, str) else size for size in spec.shape]
        inputs[spec.name] = _random(spec, shape, _rows(program, spec.name), generator, flags)
        if padded and _may_be_mask(program, spec):
            _pad(inputs[spec.name])
        if padded:
            _strew(inputs[spec.name], _compared_numbers(program, spec.name))
    return inputs


def all_sizes(program: Program, batch: int, sequence: int) -> dict[str, int] | None:
    """The value of every named size at a batch and a sequence size, or None if the program's rules allow none.

    A size that follows from these two by a rule is what the rule says, any other one is that of its like.
    """
    names = dict.fromkeys(size for spec in program.inputs for size in spec.shape if isinstance(size, str))
    sizes = {name: size for name, size in (("batch", batch), ("sequence", sequence)) if name in names}
    rules = program.call.sizes
    if broken_rule(rules, sizes) is not None:
        return None
    for name in names:
        if name in sizes:
            continue
        likely_sizes = (batch, sequence) if name.startswith("batch") else (sequence, batch)
        candidates = ({**sizes, name: size} for size in (*likely_sizes, *range(1, 4 * max(sequence, batch) + 4)))
        solution = next((candidate for candidate in candidates if broken_rule(rules, candidate) is None), None)
        if solution is None:
            return None
        sizes = solution
    return sizes


def _may_be_mask(program: Program, spec: InputSpec) -> bool:
    whole = not getattr(torch, spec.dtype).is_floating_point
    return whole and len(spec.shape) > 1 and _rows(program, spec.name) is None and spec.shape[-1] == "sequence"


def _pad(mask: Tensor) -> None:
    """Row r ends in r zeros, or other flags, as a batch of texts of different lengths; something stays."""
    for row in range(1, len(mask)):
        end = mask[row, ..., max(1, mask.shape[-1] - row) :]
        end.copy_(~end if mask.dtype == torch.bool else torch.zeros_like(end))


def _strew(ids: Tensor, numbers: list[int]) -> None:
    """Put numbers in place of others: at the beginning of every second row, at the end of the others."""
    for row in range(len(ids) if numbers and ids.dim() > 1 else 0):
        count = min(row + 1, ids.shape[-1] - 1)
        places = slice(0, count) if row % 2 else slice(ids.shape[-1] - count, None)
        ids[row, ..., places] = numbers[row % len(numbers)]


def _compared_numbers(program: Program, name: str) -> list[int]:
    """The rows of an embedding that an input is compared with; none of what indexes no embedding."""
    rows = _rows(program, name)
    found = {
        node.args[1]
        for node in program.graph.nodes
        if node.target in COMPARISONS and isinstance(node.args[1], int) and _reshaped(node.args[0]) == name
    }
    return sorted(number for number in found if rows is not None and 0 <= number < rows)


def _random(spec: InputSpec, shape: list[int], rows: int | None, generator: torch.Generator, flags: bool) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if rows is None:
        return torch.full(shape, flags, dtype=dtype) if dtype == torch.bool else torch.ones(shape, dtype=dtype)
    return torch.randint(rows, shape, generator=generator).to(dtype)


def _rows(program: Program, name: str) -> int | None:
    """Rows of the smallest embedding that an input indexes; None if it indexes none."""
    lookups = [node for node in program.graph.nodes if node.target in _LOOKUPS and index_of(node) == name]
    rows = [_rows_of_table(program, node) for node in lookups]
    return min((number for number in rows if number is not None), default=None)


def _rows_of_table(program: Program, lookup: fx.Node) -> int | None:
    """Rows of the whole table that a lookup takes some of; None if it is computed."""
    if lookup.target is LANE_EMBEDDING:
        rows = lookup.args[3]
        assert isinstance(rows, int)
        return rows
    table = program.weights.get(_table(lookup))
    return None if table is None else table.source_shape[0]


def _table(lookup: fx.Node) -> str:
    """The weight whose rows are looked up; of a quantised one, the integers."""
    table = lookup.args[0]
    assert isinstance(table, fx.Node)
    return _weight_of(table)


def _weight_of(table: fx.Node) -> str:
    if table.target is torch.ops.kraken.dequantize.default:
        (table, *_) = table.all_input_nodes
    return table.name


def _rows_of(program: Program, table: fx.Node) -> int | None:
    """Rows of a table, a weight or what is computed of weights; None if they grow with the sequence."""
    name = _weight_of(table)
    if name in program.weights:
        return program.weights[name].source_shape[0]
    value = table.meta.get("val")
    rows = value.shape[0] if isinstance(value, Tensor) and value.dim() else None
    return rows if isinstance(rows, int) else None


def index_of(lookup: fx.Node) -> str:
    """Name of the node whose numbers a lookup takes, whatever their shape."""
    return _reshaped(lookup.args[1])


def _reshaped(node: Any) -> str:
    """Name of the node that some number of reshapes begin with."""
    while isinstance(node, fx.Node) and node.target in _RESHAPES:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node.name


def token_input(program: Program) -> InputSpec | None:
    """The input that carries token ids: the one whole-number input that indexes an embedding."""
    inputs = _token_inputs(program)
    return inputs[0] if len(inputs) == 1 else None


def text_input(program: Program) -> InputSpec | None:
    """The input that carries the text whose next tokens are predicted: an encoder-decoder's is its decoder's."""
    inputs = _token_inputs(program)
    return next((spec for spec in inputs if spec.parameter == DECODER_IDS), token_input(program))


def vocabulary(program: Program) -> int:
    """Rows of the token embedding; of the smallest, if an encoder and a decoder have their own."""
    rows = [rows for spec in _token_inputs(program) if (rows := _rows(program, spec.name)) is not None]
    assert rows
    return min(rows)


def _token_inputs(program: Program) -> list[InputSpec]:
    return [spec for spec in program.inputs if len(spec.shape) == 2 and _rows(program, spec.name) is not None]


def position_limit(program: Program) -> int:
    """The longest sequence that the program's lookups by position allow."""
    limits = (
        longest_sequence(program, index, rows, embedded=embedded)
        for table, index, embedded in lookups(program.graph)
        if (rows := _rows_of(program, table)) is not None
    )
    return min((limit for limit in limits if limit is not None), default=NO_LIMIT)
