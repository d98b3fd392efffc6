"""How long one operator takes on a machine, by the shapes and types of its operands."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import OpOverload, op_name
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.sized import Sized
from kraken_compiler.ops.cached_attention import CACHED_ATTENTION
from kraken_compiler.ops.op_sets import ATTENTIONS, EXPERT_LINEAR, LINEAR
from kraken_compiler.passes.graph_tools import argument

PRODUCT, ATTENTION, OTHER = KINDS = ("products", "attention", "others")
"""What compute is spent on: products of matrices, attention, and everything that only moves numbers."""

_VIEWS = frozenset(
    {
        *("aten::reshape", "aten::view", "aten::permute", "aten::transpose", "aten::t", "aten::slice", "aten::select"),
        *("aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::alias", "aten::detach", "aten::split"),
        *("aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::sym_size", "aten::flatten"),
    }
)
"""Operators that only say otherwise how numbers lie."""
_LOOKUPS = frozenset({"aten::embedding", "kraken::lane_embedding", "aten::index", "aten::gather", "aten::index_select"})
"""Operators that read of their first operand only what they give."""
_PRODUCTS = frozenset({"aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "kraken::expert_linear"})
_ATTENTIONS = ATTENTIONS | {CACHED_ATTENTION, torch.ops.kraken.attention.default}


@dataclass(frozen=True)
class Cost:
    """Time of an operator.

    Attributes:
        kind: One of `KINDS`.
        seconds: What it computes or moves.
        launches: Kernels that the host starts for it.
        note: What a user should know of it; "" if nothing.
    """

    kind: str
    seconds: float
    launches: int = 1
    note: str = ""


FREE = Cost(OTHER, 0.0, 0)


def node_costs(graph: fx.Graph, sizes: Mapping[fx.Node, Any], machine: Machine, *, fused: bool) -> dict[fx.Node, Cost]:
    """The time of every call of a graph; collectives take none here.

    Args:
        graph: A lane graph.
        sizes: The shapes of its values, see `Sizer.sizes`.
        machine: What computes it.
        fused: Whether a compiler joins neighbours that only move numbers: what one of them gives to another is neither
            written nor read.

    Raises:
        UsageError: The machine has no figures for an element type, nor for one like it.
    """
    costs = {}
    for node in graph.nodes:
        if node.op == "call_function":
            costs[node] = _cost(node, sizes, machine, fused)
    return costs


def _cost(node: fx.Node, sizes: Mapping[fx.Node, Any], machine: Machine, fused: bool) -> Cost:
    result = sizes[node]
    if not isinstance(node.target, OpOverload) or not isinstance(result, (Sized, tuple, list)) or is_collective(node):
        return FREE
    if is_view(node):
        return FREE if fused else Cost(OTHER, 0.0)
    if node.target in _ATTENTIONS:
        return _attention(node, sizes, machine)
    product = _product(node, sizes)
    if product is not None:
        batch, rows, inside, columns = product
        assert isinstance(result, Sized)
        dtype = str(result.dtype).removeprefix("torch.")
        size = result.dtype.itemsize
        seconds = machine.product_seconds(batch, rows, inside, columns, dtype, size, compiled=fused)
        return Cost(PRODUCT, seconds, note=machine.note_on_products(dtype, compiled=fused))
    joined = fused and all(map(_moves_numbers, _readers(node)))
    moved = (0 if joined else _bytes(result)) + _bytes_read(node, sizes, fused)
    return Cost(OTHER, machine.memory.seconds(moved), 0 if joined else 1)


def is_view(node: fx.Node) -> bool:
    """True for operators that only say otherwise how numbers lie, or take one of several results."""
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and op_name(node.target) in _VIEWS)


def is_collective(node: fx.Node) -> bool:
    """True for what lanes do together."""
    return node.target in (
        torch.ops.kraken.all_reduce_start.default,
        torch.ops.kraken.wait.default,
        torch.ops.kraken.all_gather.default,
    )


def _moves_numbers(node: fx.Node) -> bool:
    """True for an operator that a compiler can join with its neighbours."""
    if node.op != "call_function" or is_collective(node) or node.target in _ATTENTIONS:
        return False
    return not _is_product(node)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a node's numbers, through views of them as well."""
    return [reader for user in node.users for reader in (_readers(user) if is_view(user) else [user])]


def _origin(node: fx.Node) -> fx.Node:
    """The node whose numbers a view shows."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_product(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and op_name(node.target) in _PRODUCTS


def _product(node: fx.Node, sizes: Mapping[fx.Node, Any]) -> tuple[int, int, int, int] | None:
    """Batch, rows, inside and columns of a product; None if it is something else."""
    if not _is_product(node):
        return None
    operands = [sizes[one] for one in node.args if isinstance(one, fx.Node)]
    if node.target is torch.ops.aten.addmm.default:
        operands = operands[1:]
    x, weight = operands[0], operands[1]
    inside = x.shape[-1]
    rows = max(1, x.numbers // max(1, inside))
    if node.target is LINEAR:
        return 1, rows, inside, weight.shape[0]
    if node.target is EXPERT_LINEAR:
        experts, columns = weight.shape[0], weight.shape[1]
        rows = max(1, sizes[node].numbers // columns)
        used = min(experts, rows)
        return used, -(-rows // used), inside, columns
    batch = math.prod(weight.shape[:-2])
    return batch, max(1, rows // max(1, batch)), inside, weight.shape[-1]


def _attention(node: fx.Node, sizes: Mapping[fx.Node, Any], machine: Machine) -> Cost:
    query, key, value = (sizes[operand] for operand in node.all_input_nodes[:3])
    queries, width = query.shape[-2], query.shape[-1]
    keys, moved_keys = key.shape[-2], key.bytes + value.bytes
    if node.target is CACHED_ATTENTION:
        slots, window = sizes[argument(node, 6, "slots")].shape[0], argument(node, 9, "window", 0)
        keys = min(slots, window + queries) if window else slots
        moved_keys = moved_keys // max(1, key.shape[-2]) * (keys + queries)
    # Of a prompt's own keys a query sees half on average.
    seen = keys - (queries - 1) / 2 if keys >= queries and _is_causal(node) else keys
    rows = query.numbers // max(1, queries * width)
    flops = 2.0 * rows * queries * seen * (width + value.shape[-1])
    dtype = str(query.dtype).removeprefix("torch.")
    seconds = machine.attention_seconds(flops, queries, 2 * query.bytes + moved_keys, dtype)
    return Cost(ATTENTION, seconds, note=machine.note_on_attention(dtype))


def _is_causal(node: fx.Node) -> bool:
    return node.target is CACHED_ATTENTION or bool(argument(node, 5, "is_causal", False))


def _bytes_read(node: fx.Node, sizes: Mapping[fx.Node, Any], fused: bool) -> int:
    if isinstance(node.target, OpOverload) and op_name(node.target) in _LOOKUPS:
        return _bytes(sizes[node])
    operands = [one for one in node.all_input_nodes if not (fused and _moves_numbers(_origin(one)))]
    return sum(_bytes(sizes[one]) for one in operands)


def _bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return value.bytes if isinstance(value, Sized) else 0
