"""A standard model taken apart: what a Kraken model can be begun with, found by dataflow.

As many lanes as KV heads are cut from it, so that every lane holds one KV head with its queries, whatever the
checkpoint packs together. What a projection is follows from what the graph makes of the unit vectors.

Legend: C width of the stream, G query heads of a KV head, D width of a head, F FFN columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.capture import Capture
from kraken_compiler.errors import Rejection, UnsupportedModelError
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.shards import WHOLE
from kraken_compiler.ir.weight_table import lane_weights
from kraken_compiler.ops.op_sets import ATTENTIONS, EMBEDDING, LINEAR, NORMS
from kraken_compiler.passes.lower import lower
from kraken_compiler.passes.stages import recognize

_HINT = "Train from scratch, or distil from this model without taking its weights (--teacher)."


@dataclass(frozen=True)
class Affine:
    """y = x weight.T + bias; weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor

    def rows(self, chosen: Any) -> Affine:
        return Affine(self.weight[chosen], self.bias[chosen])


@dataclass(frozen=True)
class Norm:
    """The factors [C] and what is added [C] of a norm, whether it subtracts the mean, and its epsilon."""

    gain: Tensor
    shift: Tensor
    subtracts: bool
    epsilon: float


@dataclass(frozen=True)
class StandardLayer:
    """A layer of a standard model.

    Attributes:
        norms: Before its attention and before its FFN.
        groups: Of every KV head: queries [G D, C], keys and values [D, C], output [C, G D] with its bias divided.
        ffn: What reads the stream, each [F, C]: up, or gate and up; and down [C, F].
    """

    norms: tuple[Norm, Norm]
    groups: tuple[tuple[Affine, Affine, Affine, Affine], ...]
    ffn: tuple[Affine, ...]
    down: Affine


@dataclass(frozen=True)
class Standard:
    """A standard model taken apart: embedding [V, C], which is the head, too, and positions [T, C] if it has them."""

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[StandardLayer, ...]
    final: Norm


def taken_apart(captured: Capture) -> Standard:
    """Take a standard model apart.

    Args:
        captured: The model, in float32.

    Raises:
        UnsupportedModelError: It has parts that no Kraken model has.
    """
    layers = recognize(captured.program).layers
    counts = {branch.kv_heads for branch in layers.branches if branch.kind == "attention"}
    if len(counts) != 1:
        raise unsupported("its layers have no attention, or each another number of KV heads", ())
    program, _ = lower(captured.program, counts.pop(), "standard", embedding=WHOLE, cached=False)
    return _parts(program, captured)


class _Evaluation:
    """Values of a lane's graph at given values of some nodes."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def affine(self, node: fx.Node, given: fx.Node, width: int) -> Affine:
        """What a node is of the last dim of another one, on whose numbers it depends affinely."""
        points = torch.cat([torch.zeros(1, width), torch.eye(width)])[None]
        values = self.value(node, {given: points})[0]
        return Affine((values[1:] - values[0]).T.contiguous(), values[0])

    def value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """A node's value, where some others have others than the graph gives them."""
        if node not in known:
            if node.op == "placeholder":
                known[node] = self._weights[node.name]
            else:
                arguments = fx.map_arg((node.args, dict(node.kwargs)), partial(self.value, known=known))
                known[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        return known[node]


def _parts(program: LaneProgram, captured: Capture) -> Standard:
    """The parts of a program that has a KV head on every lane."""
    read = program.reader(captured.store.read)
    lanes = [
        _Evaluation({name: value.float() for name, value in lane_weights(program.weights, lane, read).items()})
        for lane in range(program.degree)
    ]
    nodes = {node.name: node for node in program.graph.nodes}
    norms = [user for user in nodes[program.layers.final].users if user.target in NORMS]
    tables = [node for node in program.graph.nodes if node.target is EMBEDDING]
    tokens = [table for table in tables if table.args[1].op == "placeholder"]
    positions = [lanes[0].value(table.args[0], {}) for table in tables if table not in tokens]
    if len(tokens) != 1 or len(positions) > 1:
        raise unsupported("it has other embeddings than of its tokens and their positions", tables[:1])
    if len(norms) != 1 or sum(user.target is LINEAR for user in norms[0].users) != 1:
        raise unsupported("its stream does not end in a norm and a head", norms)
    embedding = lanes[0].value(tokens[0].args[0], {})
    layers = []
    for layer in program.layers.layers:
        if [branch.kind for branch in layer.branches] != ["attention", "ffn"]:
            raise UnsupportedModelError([Rejection("its layers are no attention and an FFN", path=layer.path)])
        attention, ffn = layer.branches
        groups = [_group(lane, attention, nodes, embedding.shape[1]) for lane in lanes]
        columns = [_ffn(lane, ffn, nodes, embedding.shape[1]) for lane in lanes]
        reads = tuple(
            Affine(torch.cat([one.weight for one in several]), torch.cat([one.bias for one in several]))
            for several in zip(*(reads for reads, _ in columns), strict=True)
        )
        down = Affine(
            torch.cat([one.weight for _, one in columns], 1), torch.stack([one.bias for _, one in columns]).sum(0)
        )
        # Where lanes cannot have alike, some have columns of zeros.
        there = down.weight.any(0)
        reads, down = tuple(one.rows(there) for one in reads), Affine(down.weight[:, there], down.bias)
        before = (_norm(lanes[0], _norm_of(attention, nodes)), _norm(lanes[0], _norm_of(ffn, nodes)))
        layers.append(StandardLayer(before, tuple(groups), reads, down))
    return Standard(embedding, positions[0] if positions else None, tuple(layers), _norm(lanes[0], norms[0]))


def _norm_of(branch: Branch, nodes: Mapping[str, fx.Node]) -> fx.Node:
    found = [nodes[name] for name in branch.nodes if nodes[name].target in NORMS]
    if len(found) != 1 or branch.post is not None or branch.after is not None:
        raise unsupported("a branch has other norms than one before it", found, branch.path)
    return found[0]


def _norm(lane: _Evaluation, node: fx.Node) -> Norm:
    operands = [lane.value(one, {}) for one in node.args[2:4] if isinstance(one, fx.Node)]
    gain = operands[0] if operands else torch.ones(1)
    shift = operands[1] if len(operands) > 1 else torch.zeros_like(gain)
    epsilon = next((one for one in reversed(node.args) if isinstance(one, float)), None)
    if epsilon is None:
        raise unsupported("a norm does not say its epsilon", [node])
    return Norm(gain, shift, node.target is torch.ops.aten.layer_norm.default, epsilon)


def _group(
    lane: _Evaluation, branch: Branch, nodes: Mapping[str, fx.Node], width: int
) -> tuple[Affine, Affine, Affine, Affine]:
    """Queries, keys, values and output of the one KV head of a lane."""
    norm, output = _norm_of(branch, nodes), nodes[branch.output]
    attentions = [nodes[name] for name in branch.nodes if nodes[name].target in ATTENTIONS]
    if len(attentions) != 1 or output.target is not LINEAR:
        raise unsupported("its attention is of another kind", attentions, branch.path)
    inside = {nodes[name] for name in branch.nodes}
    reads = []
    for operand in attentions[0].args[:3]:
        found = _nearest_affine(operand, inside)
        if len(found) != 1:
            raise unsupported("its attention does not take queries, keys and values from a product each", attentions)
        reads.append(lane.affine(found[0], norm, width))
    query, key, value = reads
    into = output.args[0]
    if not isinstance(into, fx.Node) or key.weight.shape != value.weight.shape or len(query.weight) % len(key.weight):
        raise unsupported("its queries, keys and values are packed in a way that is not known", [output], branch.path)
    return query, key, value, lane.affine(output, into, query.weight.shape[0])


def _ffn(
    lane: _Evaluation, branch: Branch, nodes: Mapping[str, fx.Node], width: int
) -> tuple[tuple[Affine, ...], Affine]:
    """What reads the stream (up; or gate and up), and down."""
    norm, output = _norm_of(branch, nodes), nodes[branch.output]
    into = output.args[0]
    if output.target is not LINEAR or not isinstance(into, fx.Node):
        raise unsupported("its FFN is of another kind", [output], branch.path)
    found = _nearest_affine(into, {nodes[name] for name in branch.nodes})
    if len(found) > 2:
        raise unsupported("its FFN multiplies more than a gate with what it gates", found, branch.path)
    if len(found) == 2 and found[0] in into.all_input_nodes:
        found.reverse()  # What is multiplied as it is is no gate.
    reads = tuple(lane.affine(node, norm, width) for node in found)
    return reads, lane.affine(output, into, reads[0].weight.shape[0])


def _nearest_affine(node: Any, inside: set[fx.Node]) -> list[fx.Node]:
    """The products with weights, or parts of one, that a node is computed from, those behind others left out."""
    found: list[fx.Node] = []
    todo, seen = [node], set()
    while todo:
        one = todo.pop(0)
        if one in seen or one not in inside:
            continue
        seen.add(one)
        if _is_affine(one):
            found.append(one)
        else:
            todo += one.all_input_nodes
    return found


def _is_affine(node: fx.Node) -> bool:
    if node.target is LINEAR:
        return True
    # A part of a packed product: what was split or cut along its columns.
    cuts = {"getitem", "split.Tensor", "split_with_sizes.default", "chunk.default", "slice.Tensor"}
    return getattr(node.target, "__name__", "") in cuts and all(map(_is_affine, node.all_input_nodes))


def unsupported(reason: str, nodes: Sequence[fx.Node], path: str = "") -> UnsupportedModelError:
    return UnsupportedModelError([Rejection(reason, tuple(node.name for node in nodes), path, _HINT)])
