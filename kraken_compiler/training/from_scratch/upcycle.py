"""First weights of a Kraken model out of a standard one: heads and FFN columns for every lane, on a projected stream.

A lane's stream is narrower than the standard model's. It is that stream seen through P [C, w], whose columns span most
of what the streams before all norms are on some text; what a branch reads is the projected stream times what the
projection has taken from its norm, what it writes is projected. The lanes' streams begin with a part of the embedding
each, so that their sum is the standard stream. That is a place to begin and not the same function: a lane's attention
reads its own stream alone. The parts are found by dataflow and proved: as a model of one lane and of the same width
they must give the standard model's own logits.

Legend: C width of the standard stream, w of a lane's, G query heads of a KV head, D width of a head, F FFN columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.capture import Capture
from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.shards import WHOLE
from kraken_compiler.ir.weight_table import lane_weights
from kraken_compiler.lanes.logits import inputs_function, logits_function
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.native.config import LAYER_NORM, LEARNED, RMS_NORM, SWIGLU, KrakenConfig
from kraken_compiler.native.model import KrakenLM
from kraken_compiler.ops.op_sets import ATTENTIONS, EMBEDDING, LINEAR, NORMS
from kraken_compiler.passes.lower import lower

_TOLERANCE = 1e-3
"""Of the logits, relative to the largest."""
_HINT = "Train from scratch, or distil from this model without taking its weights (--teacher)."


@dataclass(frozen=True)
class _Affine:
    """y = x weight.T + bias; weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor

    def rows(self, chosen: Any) -> _Affine:
        return _Affine(self.weight[chosen], self.bias[chosen])


@dataclass(frozen=True)
class _Norm:
    """The factors [C] and what is added [C] of a norm, whether it subtracts the mean, and its epsilon."""

    gain: Tensor
    shift: Tensor
    subtracts: bool
    epsilon: float


@dataclass(frozen=True)
class _Layer:
    """A layer of a standard model.

    Attributes:
        norms: Before its attention and before its FFN.
        groups: Of every KV head: queries [G D, C], keys and values [D, C], output [C, G D] with its bias divided.
        ffn: What reads the stream, each [F, C]: up, or gate and up; and down [C, F].
    """

    norms: tuple[_Norm, _Norm]
    groups: tuple[tuple[_Affine, _Affine, _Affine, _Affine], ...]
    ffn: tuple[_Affine, ...]
    down: _Affine


@dataclass(frozen=True)
class _Standard:
    """A standard model taken apart: embedding [V, C], which is the head, too, and positions [T, C] if it has them."""

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[_Layer, ...]
    final: _Norm


def upcycled(config: KrakenConfig, captured: Capture, rows: Tensor) -> KrakenLM:
    """A Kraken model whose weights are taken from a standard one.

    Args:
        config: Of the Kraken model; its heads are as wide as those of the standard model, and its layers as many.
        captured: The standard model.
        rows: Token ids that it reads, int64 [B, S], to find out what is in its stream.

    Raises:
        UsageError: The sizes do not go together.
        UnsupportedModelError: The model computes something that no Kraken model does.
    """
    kv_heads = _kv_heads(captured)
    program, _ = lower(captured.program, kv_heads, "standard", embedding=WHOLE, cached=False)
    parts = _parts(program, captured)
    _require_fitting(config, parts)
    ids = rows[:, : min(rows.shape[1], config.context)]
    _require_same(config, parts, captured, ids[:2])
    projection, kept = _projection(program, captured, ids, config)
    return _filled(KrakenLM(config), parts, projection, kept)


def _kv_heads(captured: Capture) -> int:
    """How many lanes have one KV head each."""
    program, _ = lower(captured.program, 1, "standard", embedding=WHOLE, cached=False)
    return max(branch.kv_heads for branch in program.layers.branches if branch.kind == "attention")


class _Evaluation:
    """Values of a lane's graph at given values of some nodes."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def affine(self, node: fx.Node, given: fx.Node, width: int) -> _Affine:
        """What a node is of the last dim of another one, on whose numbers it depends affinely."""
        points = torch.cat([torch.zeros(1, width), torch.eye(width)])[None]
        values = self.value(node, {given: points})[0]
        return _Affine((values[1:] - values[0]).T.contiguous(), values[0])

    def value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """A node's value, where some others have others than the graph gives them."""
        if node not in known:
            if node.op == "placeholder":
                known[node] = self._weights[node.name]
            else:
                arguments = fx.map_arg((node.args, dict(node.kwargs)), partial(self.value, known=known))
                known[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        return known[node]


def _parts(program: LaneProgram, captured: Capture) -> _Standard:
    """Take a standard model apart: of a program with a KV head on every lane."""
    read = program.reader(captured.store.read)
    lanes = [
        _Evaluation({name: value.float() for name, value in lane_weights(program.weights, lane, read).items()})
        for lane in range(program.degree)
    ]
    nodes = {node.name: node for node in program.graph.nodes}
    (norm,) = (user for user in nodes[program.layers.final].users if user.target in NORMS)
    tables = [node for node in program.graph.nodes if node.target is EMBEDDING]
    tokens = [table for table in tables if table.args[1].op == "placeholder"]
    positions = [lanes[0].value(table.args[0], {}) for table in tables if table not in tokens]
    head = [user for user in norm.users if user.target is LINEAR]
    if len(tokens) != 1 or len(positions) > 1 or len(head) != 1:
        raise _unsupported("it has other embeddings than of its tokens and their positions", tables[:1])
    embedding = lanes[0].value(tokens[0].args[0], {})
    layers = []
    for layer in program.layers.layers:
        if [branch.kind for branch in layer.branches] != ["attention", "ffn"]:
            raise UnsupportedModelError([Rejection("its layers are no attention and an FFN", path=layer.path)])
        attention, ffn = layer.branches
        groups = [_group(lane, attention, nodes, embedding.shape[1]) for lane in lanes]
        columns = [_ffn(lane, ffn, nodes, embedding.shape[1]) for lane in lanes]
        reads = tuple(
            _Affine(torch.cat([one.weight for one in several]), torch.cat([one.bias for one in several]))
            for several in zip(*(reads for reads, _ in columns), strict=True)
        )
        down = _Affine(torch.cat([one.weight for _, one in columns], 1), sum_of([one.bias for _, one in columns]))
        # Where lanes cannot have alike, some have columns of zeros.
        there = down.weight.any(0)
        reads, down = tuple(one.rows(there) for one in reads), _Affine(down.weight[:, there], down.bias)
        norms = (_norm(lanes[0], _norm_of(attention, nodes)), _norm(lanes[0], _norm_of(ffn, nodes)))
        layers.append(_Layer(norms, tuple(groups), reads, down))
    return _Standard(embedding, positions[0] if positions else None, tuple(layers), _norm(lanes[0], norm))


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(values)).sum(0)


def _norm_of(branch: Branch, nodes: Mapping[str, fx.Node]) -> fx.Node:
    found = [nodes[name] for name in branch.nodes if nodes[name].target in NORMS]
    if len(found) != 1 or branch.post is not None or branch.after is not None:
        raise _unsupported("a branch has other norms than one before it", found, branch.path)
    return found[0]


def _norm(lane: _Evaluation, node: fx.Node) -> _Norm:
    operands = [lane.value(one, {}) for one in node.args[2:4] if isinstance(one, fx.Node)]
    gain = operands[0] if operands else torch.ones(1)
    shift = operands[1] if len(operands) > 1 else torch.zeros_like(gain)
    epsilon = next(one for one in reversed(node.args) if isinstance(one, float))
    return _Norm(gain, shift, node.target is torch.ops.aten.layer_norm.default, epsilon)


def _group(
    lane: _Evaluation, branch: Branch, nodes: Mapping[str, fx.Node], width: int
) -> tuple[_Affine, _Affine, _Affine, _Affine]:
    """Queries, keys, values and output of the one KV head of a lane."""
    norm, output = _norm_of(branch, nodes), nodes[branch.output]
    attentions = [nodes[name] for name in branch.nodes if nodes[name].target in ATTENTIONS]
    if len(attentions) != 1 or output.target is not LINEAR:
        raise _unsupported("its attention is of another kind", attentions, branch.path)
    inside = {nodes[name] for name in branch.nodes}
    reads = []
    for operand in attentions[0].args[:3]:
        found = _nearest_affine(operand, inside)
        if len(found) != 1:
            raise _unsupported("its attention does not take queries, keys and values from a product each", attentions)
        reads.append(lane.affine(found[0], norm, width))
    query, key, value = reads
    into = output.args[0]
    assert isinstance(into, fx.Node)
    return query, key, value, lane.affine(output, into, query.weight.shape[0])


def _ffn(
    lane: _Evaluation, branch: Branch, nodes: Mapping[str, fx.Node], width: int
) -> tuple[tuple[_Affine, ...], _Affine]:
    """What reads the stream (up; or gate and up), and down."""
    norm, output = _norm_of(branch, nodes), nodes[branch.output]
    into = output.args[0]
    if output.target is not LINEAR or not isinstance(into, fx.Node):
        raise _unsupported("its FFN is of another kind", [output], branch.path)
    found = _nearest_affine(into, {nodes[name] for name in branch.nodes})
    if len(found) > 2:
        raise _unsupported("its FFN multiplies more than a gate with what it gates", found, branch.path)
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


def _require_fitting(config: KrakenConfig, parts: _Standard) -> None:
    query, key, *_ = parts.layers[0].groups[0]
    head, per_key = len(key.weight), len(query.weight) // len(key.weight)
    asked: dict[str, tuple[float, float]] = {
        "layers": (config.layers, len(parts.layers)),
        "vocabulary": (config.vocabulary, len(parts.embedding)),
        "width of a head": (config.head, head),
        "query heads of a KV head": (config.heads // config.keys, per_key),
        "products of an FFN that read the stream": (2 if config.ffn == SWIGLU else 1, len(parts.layers[0].ffn)),
        "positions that are learnt": (int(config.positions == LEARNED), int(parts.positions is not None)),
        "norms that subtract the mean": (int(config.norm == LAYER_NORM), int(parts.final.subtracts)),
        "norm_epsilon": (config.norm_epsilon, parts.final.epsilon),
    }
    for what, (wanted, found) in asked.items():
        if wanted != found:
            raise UsageError(f"--from: {what}: {found} in that model, {wanted} in the one that is trained")


def _require_same(config: KrakenConfig, parts: _Standard, captured: Capture, ids: Tensor) -> None:
    """Put the parts together again as a Kraken model of one lane and of the standard width, and compare logits."""
    query, key, *_ = parts.layers[0].groups[0]
    width, groups = parts.embedding.shape[1], len(parts.layers[0].groups)
    whole = replace(
        config,
        degree=1,
        width=groups * len(query.weight),
        heads=groups * (len(query.weight) // len(key.weight)),
        kv_heads=groups,
        expansion=len(parts.layers[0].ffn[0].weight) / width,
    )
    if whole.width != width:
        raise UsageError(f"--from: the heads of that model are {whole.width} wide together, its stream {width}")
    model = _filled(KrakenLM(whole), parts, torch.eye(width), 1.0)
    assert captured.model is not None, "it has weights"
    program = captured.program
    read_lane = read_from_source(program, captured.store.read)
    source = logits_function(program.inputs, program.call, StreamingProgram(program, read_lane).run_flat)
    with torch.no_grad():
        want, have = source(ids).float(), model(ids)
    error = ((have - want).abs().max() / want.abs().max()).item()
    if not error <= _TOLERANCE:
        reason = f"it computes something that no Kraken model does: of its parts come logits that are {error:.1e} off"
        raise UnsupportedModelError([Rejection(reason, hint=_HINT)])


def _projection(program: LaneProgram, captured: Capture, ids: Tensor, config: KrakenConfig) -> tuple[Tensor, float]:
    """P [C, w], and the share of the normed streams' squares that is in its span."""
    covariance: Tensor | None = None
    names = list(dict.fromkeys(branch.stream for branch in program.layers.branches))
    streaming = StreamingProgram(program, read_from_source(program, captured.store.read))
    with torch.no_grad():
        _, streams = streaming.run_with_taps(inputs_function(program.inputs)(ids), names)
    for x in streams.values():
        x_TC = x.flatten(0, -2).double()
        if config.norm == LAYER_NORM:
            x_TC = x_TC - x_TC.mean(-1, keepdim=True)
        x_TC = x_TC / x_TC.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        covariance = x_TC.T @ x_TC + (0 if covariance is None else covariance)
    assert covariance is not None
    width = len(covariance)
    spanned = covariance
    if config.norm == LAYER_NORM:
        # The mean is a direction of its own, and that of the narrow stream is its image.
        spanned = covariance + torch.full_like(covariance, 1 / width) * covariance.trace()
    basis = torch.linalg.eigh(spanned).eigenvectors[:, -config.width :]
    kept = ((basis.T @ covariance @ basis).trace() / covariance.trace()).item()
    if config.norm == LAYER_NORM:
        basis = basis @ _rotation_to_mean(basis.T @ torch.full((width,), width**-0.5, dtype=torch.float64))
    return basis.float(), kept


def _rotation_to_mean(direction: Tensor) -> Tensor:
    """An orthogonal matrix R for which direction @ R is the mean's direction, where all coordinates are alike."""
    direction = direction / direction.norm()
    target = torch.full_like(direction, len(direction) ** -0.5)
    mirror = direction - target
    if mirror.norm() < 1e-9:
        return torch.eye(len(direction), dtype=direction.dtype)
    mirror = mirror / mirror.norm()
    return torch.eye(len(direction), dtype=direction.dtype) - 2 * torch.outer(mirror, mirror)


def _filled(model: KrakenLM, parts: _Standard, projection_Cw: Tensor, kept: float) -> KrakenLM:
    """Give a Kraken model the parts of a standard one; `kept` is the share of its stream that the projection keeps."""
    config = model.config
    width = projection_Cw.shape[0]
    # A norm divides by the root of the mean square, which is another one of fewer coordinates.
    scale = math.sqrt(width * kept / config.width)

    def reading(part: _Affine, norm: _Norm) -> _Affine:
        return _Affine(
            scale * (part.weight * norm.gain) @ projection_Cw, part.bias + part.weight @ norm.shift.expand(width)
        )

    with torch.no_grad():
        model.embedding.weight.copy_(parts.embedding @ projection_Cw / config.degree)
        if model.positions is not None and parts.positions is not None:
            model.positions.weight.copy_(parts.positions[: config.context] @ projection_Cw / config.degree)
        gain = parts.final.gain.expand(width)
        model.norm.weight.copy_(config.degree * scale * (projection_Cw**2).T @ gain)  # type: ignore[operator]
        if config.norm != RMS_NORM:
            model.norm.bias.copy_(config.degree * projection_Cw.T @ parts.final.shift.expand(width))  # type: ignore[operator]
        for number, layer in enumerate(parts.layers):
            heads = _spread(len(layer.groups), config.keys, config.degree)
            order = (layer.down.weight.norm(dim=0) * layer.ffn[-1].weight.norm(dim=1)).argsort(descending=True)
            columns = _dealt(order, config.inside, config.degree)
            for lane in range(config.degree):
                into = model.lane(lane).layer(number)
                taken = [(layer.groups[group], 1 / shared) for group, shared in heads[lane]]
                for at, module in enumerate((into.attention.query, into.attention.key, into.attention.value)):
                    _set(module, [reading(group[at], layer.norms[0]) for group, _ in taken])
                outs = [group[3].weight * share for group, share in taken]
                bias = sum_of([group[3].bias for group in layer.groups]) / config.degree
                _set(into.attention.out, [_Affine(projection_Cw.T @ torch.cat(outs, 1), projection_Cw.T @ bias)])
                chosen, shares = columns[lane]
                modules = (into.ffn.up,) if into.ffn.gate is None else (into.ffn.gate, into.ffn.up)
                for module, part in zip(modules, layer.ffn, strict=True):
                    _set(module, [reading(part, layer.norms[1]).rows(chosen)])
                down = projection_Cw.T @ (layer.down.weight[:, chosen] * shares)
                _set(into.ffn.down, [_Affine(down, projection_Cw.T @ layer.down.bias / config.degree)])
        for lane in range(config.degree):
            model.lane(lane).join.weight.copy_(torch.eye(config.width))
    return model.eval()


def _set(module: torch.nn.Linear, parts: Sequence[_Affine]) -> None:
    module.weight.copy_(torch.cat([part.weight for part in parts]))
    if module.bias is not None:
        module.bias.copy_(torch.cat([part.bias for part in parts]))


def _spread(count: int, each: int, lanes: int) -> list[list[tuple[int, int]]]:
    """Which of `count` heads every lane takes, `each` of them, and how many lanes have each."""
    taken = [[(lane * count // lanes + number) % count for number in range(each)] for lane in range(lanes)]
    shared = [sum(row.count(one) for row in taken) for one in range(count)]
    return [[(one, shared[one]) for one in row] for row in taken]


def _dealt(order: Tensor, each: int, lanes: int) -> list[tuple[Tensor, Tensor]]:
    """Which columns every lane takes, `each` of them, those that matter most first; and one over how many have each."""
    places = torch.arange(each * lanes) % len(order)
    if each * lanes <= len(order):
        dealt = order[places].view(each, lanes).T
    else:
        dealt = torch.stack(
            [order[(torch.arange(each) + lane * len(order) // lanes) % len(order)] for lane in range(lanes)]
        )
    counts = torch.bincount(dealt.flatten(), minlength=len(order))
    return [(row, 1 / counts[row]) for row in dealt]


def _unsupported(reason: str, nodes: Sequence[fx.Node], path: str = "") -> UnsupportedModelError:
    return UnsupportedModelError([Rejection(reason, tuple(node.name for node in nodes), path, _HINT)])
