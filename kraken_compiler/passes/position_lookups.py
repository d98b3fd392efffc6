"""The number of tokens for which the lookups in a graph have rows, found by computing which rows they take.

A lookup by position ends with its table: `embedding(%table, arange(%s))`. One that takes the same row for every token
(token types), or one of a few (relative distances in buckets), ends nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import InputSpec, Program

_MOST, _MOST_OF_PAIRS = 1 << 17, 1 << 11
"""The longest sequences tried, the second where values are computed for pairs of tokens."""
_MOST_NODES = 200
_INDEX = torch.ops.aten.index.Tensor


def lookups(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """Table and index of everything that takes rows of a table, and whether negative numbers take none."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, index = node.args[:2]
        elif node.target is torch.ops.aten.index_select.default and node.args[1] == 0:
            table, index = node.args[0], node.args[2]
        elif node.target is _INDEX and len(node.args[1]) == 1:
            table, index = node.args[0], node.args[1][0]
        else:
            continue
        if isinstance(table, fx.Node) and isinstance(index, fx.Node):
            yield table, index, node.target is not _INDEX


def longest_sequence(program: Program, index: fx.Node, rows: int, *, embedded: bool = True) -> int | None:
    """The longest sequence for which an index stays within its table.

    Args:
        program: The program.
        index: The node that computes which rows are taken.
        rows: How many the table has.
        embedded: By `embedding`, which takes no negative numbers.

    Returns:
        None if every sequence that was tried does, or if the index follows from the model's floating-point weights.
    """
    nodes = _origins(index)
    if len(nodes) > _MOST_NODES or any(_is_unknown(program, node) for node in nodes):
        return None
    limits = [_reach(program, nodes, rows, token, embedded) for token in (0, 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def _reach(program: Program, nodes: list[fx.Node], rows: int, token: int, embedded: bool) -> int | None:
    three, four = (_shapes(_values(program, nodes, length, token)) for length in (3, 4))
    growing_dims = [
        [dim for dim, (short, long) in enumerate(zip(one, other)) if (short, long) == (3, 4)]
        for one, other in zip(three, four, strict=True)
    ]

    def fits(length: int) -> bool:
        try:
            index = _values(program, nodes, length, token)[nodes[-1]]
        except (RuntimeError, IndexError, ValueError):
            return False  # stored positions end here
        if not all(index.shape[dim] == length for dim in growing_dims[-1]):
            return False  # a stored index is cut where it ends
        # Only an embedding has no rows that are counted from its end.
        first = 0 if embedded else -rows
        return bool(((index >= first) & (index < rows)).all())

    low, high = 0, (_MOST_OF_PAIRS if any(len(dims) > 1 for dims in growing_dims) else _MOST) + 1
    if fits(high - 1):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _origins(node: fx.Node) -> list[fx.Node]:
    """Everything that `node` is computed from, itself last."""
    origins, todo = {node}, [node]
    while todo and len(origins) <= _MOST_NODES:
        for operand in todo.pop().all_input_nodes:
            if operand not in origins:
                origins.add(operand)
                todo.append(operand)
    return [other for other in node.graph.nodes if other in origins]


def _is_unknown(program: Program, node: fx.Node) -> bool:
    """True for a weight whose numbers nobody knows before the model is loaded."""
    spec = program.weights.get(node.name) if node.op == "placeholder" else None
    return spec is not None and spec.torch_dtype.is_floating_point and spec.source not in program.constants


def _shapes(values: dict[fx.Node, Any]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) if isinstance(value, Tensor) else () for value in values.values()]


def _values(program: Program, nodes: list[fx.Node], length: int, token: int) -> dict[fx.Node, Any]:
    inputs = {spec.name: spec for spec in program.inputs}
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.name in inputs and node.op == "placeholder":
            values[node] = _input(inputs[node.name], length, token)
        elif node.op == "placeholder":
            spec = program.weights[node.name]
            constant = program.constants.get(spec.source)
            # Whole numbers of a checkpoint stay within the table, up to where they end.
            values[node] = torch.zeros(spec.shape, dtype=spec.torch_dtype) if constant is None else constant
        else:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _input(spec: InputSpec, length: int, token: int) -> Tensor:
    """The usual value of an input: ones in a mask, positions where that is what an input is called."""
    sizes = [1 if size == "batch" else length if isinstance(size, str) else size for size in spec.shape]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if "position" in spec.parameter and sizes:
        return torch.arange(sizes[-1]).expand(sizes).to(dtype)
    return torch.full(sizes, 1 if "mask" in spec.parameter else token, dtype=dtype)
