"""Numbers that a graph computes from positions alone: run the few nodes that a mask or a position index depends on."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import DEQUANTIZE, LINEAR, MASKED_FILLS, SHAPE_ONLY
from kraken_compiler.passes.cache.length_independence import ELEMENTS_KEPT, RESHAPES
from kraken_compiler.passes.choosing import WHERE
from kraken_compiler.passes.graph_tools import ancestors, args_of, aten, in_order
from kraken_compiler.passes.shapes import is_tensor, value_of

_SMOOTH = (
    ELEMENTS_KEPT
    | RESHAPES
    | {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.rsub.Scalar,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.neg.default,
        aten.exp.default,
        aten.exp2.default,
        aten.pow.Scalar,
        aten.softplus.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.square.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.index_select.default,
        aten.index.Tensor,
        aten.embedding.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.cat.default,
        aten.stack.default,
        aten.split.Tensor,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        LINEAR,
        DEQUANTIZE,
    }
)
"""Operators on floats whose result has no edge at any number, and those that only move numbers."""


def origins(program: Program, node: fx.Node) -> list[fx.Node]:
    """Everything that `node` is computed from, itself included, in graph order."""
    return in_order({other: place for place, other in enumerate(program.graph.nodes)}, ancestors(node))


def constant_of(program: Program, node: fx.Node) -> Tensor | None:
    """The whole value of a placeholder that is no checkpoint's; None for anything else."""
    spec = program.weights.get(node.name) if node.op == "placeholder" else None
    return program.constants.get(spec.source) if spec is not None else None


def stored_weights(program: Program, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The weights among `nodes` whose values are not at hand."""
    return [node for node in nodes if node.name in program.weights and constant_of(program, node) is None]


def deciding_weight(program: Program, nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The first of `nodes` where weights whose values are not at hand decide something, if any does.

    Smooth functions of floats decide nothing: two random draws tell what they make of any numbers. What compares,
    rounds or bends may do one thing with those and another with the real ones.
    """
    unknown = set(stored_weights(program, nodes))
    for node in nodes:
        operands = unknown.intersection(node.all_input_nodes)
        if (not operands and node not in unknown) or node.target in SHAPE_ONLY:
            continue
        is_smooth = node.op == "placeholder" or node.target in _SMOOTH or _chooses_by_others(node, unknown)
        if not is_smooth or not is_tensor(node) or not value_of(node).is_floating_point():
            return node
        unknown.add(node)
    return None


def _chooses_by_others(node: fx.Node, unknown: Set[fx.Node]) -> bool:
    """True for a choice between values, whose condition is none of the unknown ones."""
    condition_place = {**dict.fromkeys(WHERE, 0), **dict.fromkeys(MASKED_FILLS, 1)}
    return node.target in condition_place and args_of(node)[condition_place[node.target]] not in unknown


def draws(program: Program, nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Lane and seed of the evaluations that together stand for all lanes and all values of the weights.

    Weights have no values yet. What holds for two random draws holds for any where weights are only computed with;
    where they decide, as in a comparison, nothing follows from random ones (see `deciding_weight`).
    """
    specs = [program.weights[node.name] for node in nodes if node.name in program.weights]
    lanes = program.degree if any(spec.shards for spec in specs) else 1
    return [(lane, seed) for lane in range(lanes) for seed in range(1 + bool(stored_weights(program, nodes)))]


def evaluate(
    program: Program, nodes: Sequence[fx.Node], length: int, lane: int, seed: int = 0, batch: int = 1
) -> Tensor:
    """The value of the last of `nodes` on one lane.

    Args:
        program: A lane program whose only input is its tokens.
        nodes: What `origins` gave.
        length: Number of tokens; which tokens they are does not matter, they are all 0.
        lane: Number of the lane.
        seed: Weights have no values yet; they get random ones, with seed 1 negative ones: a sign may decide.
        batch: Number of rows.
    """
    result = evaluate_all(program, nodes, length, lane, seed, batch, keep=nodes[-1:])[nodes[-1]]
    assert isinstance(result, Tensor)
    return result


def evaluate_all(
    program: Program,
    nodes: Sequence[fx.Node],
    length: int,
    lane: int,
    seed: int = 0,
    batch: int = 1,
    *,
    keep: Sequence[fx.Node],
) -> dict[fx.Node, Any]:
    """The values of those of `nodes` that are in `keep`; see `evaluate`."""
    generator = torch.Generator().manual_seed(seed)
    # What nobody reads any more goes at once: for long sequences every value of pairs of positions is large.
    last_reader = {operand: node for node in nodes for operand in node.all_input_nodes}
    kept = set(keep)
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            spec = program.weights.get(node.name)
            tokens = torch.zeros(batch, length, dtype=value_of(node).dtype)
            values[node] = tokens if spec is None else _weight(program, node, lane, generator, -seed)
        else:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        for operand in node.all_input_nodes:
            if last_reader[operand] is node and operand not in kept:
                del values[operand]
    return values


def _weight(program: Program, node: fx.Node, lane: int, generator: torch.Generator, lowest: int) -> Tensor:
    spec, constant = program.weights[node.name], constant_of(program, node)
    if constant is not None:
        return spec.take(constant, lane)
    random: Tensor = lowest + torch.rand(spec.shape, generator=generator)
    return random.to(spec.torch_dtype)
