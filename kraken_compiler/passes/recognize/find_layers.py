"""Find the branches on the residual streams, and the layers they form. An analysis, by dataflow alone.

A link of a stream's chain (`find_streams.py`) from p to d is a *join* when d is a sum of p and other terms; each other
term is the output of one branch. A branch with a scaled_dot_product_attention in it is an attention branch, any other
an FFN branch:

    p ---------------------------------> d = p + term          sequential
    p ---------------------------------> d = p + term + term   parallel attention and FFN
     \\--> norm -> linear -> ... -> linear (output projection) -> term

Norms may follow a branch (sandwich norms: between output projection and term) and the sum itself (post-norm: between d
and the next link); they need complete sums, so they are no part of the branch but kept beside it.

A decoder's cross-attention is a branch of the decoder's stream. It also reads what the encoder has made: its keys' and
values' projections are part of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.layers import Branch, Encoder, Layer, LayerTable, Replay
from kraken_compiler.ir.program import Program, Recognized
from kraken_compiler.ir.windows import is_gemm
from kraken_compiler.ops.op_sets import ATTENTIONS, DEQUANTIZE, LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import (
    ancestors,
    args_of,
    aten,
    calls,
    descendants,
    grain_of,
    in_order,
    module_path,
)
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.find_streams import Join, Stream, find_streams
from kraken_compiler.passes.recognize.projections import find_part, find_projections
from kraken_compiler.passes.shapes import is_tensor, same_shape, shape_of


@dataclass(frozen=True)
class FindLayers(Pass[Program]):
    name: ClassVar[str] = "find-layers"

    def run(self, program: Program) -> PassResult:
        table = find_layers(program)
        if isinstance(table, Rejection):
            return PassResult(rejections=(table,))
        return PassResult(len(table.layers), program=program.at(Recognized, layers=table))


def find_layers(program: Program) -> LayerTable | Rejection:
    """The layers of a program in normal form."""
    streams = find_streams(program)
    return streams if isinstance(streams, Rejection) else _layer_table(program, streams)


def _reject(reason: str, node: fx.Node | None = None, hint: str = "") -> Rejection:
    return Rejection(reason, (node.name,) if node else (), module_path(node) if node else "", hint)


def _layer_table(program: Program, streams: tuple[Stream, ...]) -> LayerTable | Rejection:
    branches: list[Branch] = []
    points: list[tuple[int, str]] = []
    for stream in streams:
        # Where a decoder begins, the encoder's stream ends: the point has one node.
        points += [(0, stream.joins[0].before.name)] if not branches else []
        rejection = _branches(program, stream, branches, points)
        if rejection is not None:
            return rejection
    if not any(branch.kind == "attention" for branch in branches):
        return _no_attention(program, streams[0])
    joins = streams[-1].joins
    return LayerTable(
        embedding=joins[0].before.name,
        joins=tuple(points),
        final=joins[-1].after.name,
        head=_head(joins[-1].after, program),
        layers=_group(branches),
        encoder=_encoder(*streams) if len(streams) > 1 else None,
    )


def _no_attention(program: Program, stream: Stream) -> Rejection:
    """The rejection of what looks most like one: a softmax, else a product of two activations, in a branch."""
    inside = {node for join in stream.joins for term in join.terms for node in ancestors(term, {join.before})}
    weights = weight_derived(program)
    for targets in ((aten.softmax.int, aten._softmax.default), (aten.matmul.default, aten.bmm.default)):
        for node in calls(program.graph, *targets):
            if node in inside and not weights & set(node.all_input_nodes):
                reason = (
                    "no branch of the residual stream holds an attention of a known kind, and this is part of another"
                )
                return _reject(reason, node, _ATTENTION_HINT)
    first = stream.joins[0].after
    return _reject("no branch of the residual stream holds an attention", first, _ATTENTION_HINT)


def _encoder(encoder: Stream, decoder: Stream) -> Encoder:
    assert decoder.context is not None
    first, last = encoder.joins[0], encoder.joins[-1]
    return Encoder(first.before.name, last.after.name, decoder.context.name)


def _branches(
    program: Program, stream: Stream, branches: list[Branch], points: list[tuple[int, str]]
) -> Rejection | None:
    """Add the branches of one stream, and the points that they lead to."""
    weights = weight_derived(program)
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    joins, hidden, base = stream.joins, stream.hidden, len(branches)
    layer = branches[-1].layer if branches else -1
    first_layer = layer
    afters = [_replay(left.after, right.before, hidden, place) for left, right in itertools.pairwise(joins)]
    for join, after in zip(joins, [*afters, None], strict=True):
        reads = len(branches)
        new_branches = []
        rejection = _reject_nested(join, hidden)
        if rejection is not None:
            return rejection
        for term in join.terms:
            new_branch = _measure(term, join, stream, place, weights, program)
            if isinstance(new_branch, Rejection):
                return new_branch
            new_branches.append(new_branch)
        # Where attention and FFN are parallel, attention goes first: a form may let the FFN read it.
        for branch in sorted(new_branches, key=lambda branch: branch.kind):
            is_cross = stream.context is not None and _reads(stream.context, branch)
            if layer == first_layer or (branch.kind == "attention" and not is_cross):
                layer += 1
            branches.append(replace(branch, index=len(branches) + 1, layer=layer, reads=reads, base=base))
        branches[-1] = replace(branches[-1], after=after)
        points.append((len(branches), after.nodes[-1] if after else join.after.name))
    return None


def _reject_nested(join: Join, hidden: frozenset[fx.Node]) -> Rejection | None:
    """The rejection of a term that reads another one, of which lanes have only parts then; None if there is none."""
    for term, other in itertools.permutations(join.terms, 2):
        for node in ancestors(term, {join.before}, hidden):
            if other in node.all_input_nodes:
                reason = f"it reads the output of another branch ('{other.name}') before that is added to the stream"
                return _reject(reason, node, _BRANCH_HINT)
    return None


def _measure(
    term: fx.Node,
    join: Join,
    stream: Stream,
    place: dict[fx.Node, int],
    weights: set[fx.Node],
    program: Program,
) -> Branch | Rejection:
    """The branch that adds `term`, not numbered yet."""
    hidden = stream.hidden
    ends = {join.before} if stream.context is None else {join.before, stream.context}
    above = in_order(place, ancestors(term, ends, hidden))
    part = find_part(term, above, join.before, weights)
    if part is not term and not same_shape(part, join.before):
        whole = find_projections(term, above, weights, join.before)
        if isinstance(whole, Rejection):
            return whole
        reason = "what follows the branch's output projection does not leave it in the shape of the stream"
        return _reject(reason, part, _BRANCH_HINT)
    nodes = in_order(place, ancestors(part, ends, hidden))
    attentions = [node for node in nodes if node.target in ATTENTIONS]
    if len(attentions) > 1:
        return _reject("a branch holds more than one attention", attentions[1], _BRANCH_HINT)
    if attentions and len(shape_of(attentions[0])) != 4:
        return _reject("an attention has no dim of heads by themselves", attentions[0], _ATTENTION_HINT)
    projections = find_projections(part, nodes, weights, join.before)
    if isinstance(projections, Rejection):
        return projections
    heads, columns = _heads(attentions[0]) if attentions else 0, int(shape_of(args_of(projections.output)[0])[-1])
    return Branch(
        index=0,
        layer=0,
        kind="attention" if attentions else "ffn",
        path=_branch_path(projections.output, attentions),
        stream=join.before.name,
        reads=0,
        output=part.name,
        nodes=tuple(node.name for node in nodes),
        heads=heads,
        kv_heads=projections.kv_heads(attentions[0], program) if attentions else 0,
        columns=columns,
        post=_replay(part, term, hidden, place),
        unit=_unit(projections.output, heads, columns),
    )


def _reads(context: fx.Node, branch: Branch) -> bool:
    names = set(branch.nodes)
    return any(user.name in names for user in context.users)


def _replay(source: fx.Node, result: fx.Node, hidden: frozenset[fx.Node], place: dict[fx.Node, int]) -> Replay | None:
    """The nodes that make `result` out of `source`; None if they are the same."""
    nodes = in_order(place, ancestors(result, {source}, hidden))
    return Replay(source.name, tuple(node.name for node in nodes)) if nodes else None


_ATTENTION_HINT = (
    "Attention must be a scaled_dot_product_attention or softmax(q k^T + mask) v over [batch, heads, ...]."
)


_BRANCH_HINT = "A branch must be one attention or one FFN that is added to the stream by itself."


def _heads(attention: fx.Node) -> int:
    return int(shape_of(attention)[-3])


def _unit(output: fx.Node, heads: int, columns: int) -> int:
    """Number of heads, or columns if there are none, that a cut of the output projection's weight leaves together."""
    weight = args_of(output)[1]
    grain = math.lcm(*(grain_of(node) for node in ancestors(weight) if node.target is DEQUANTIZE))
    width = columns // heads if heads else 1
    # Where heads have no columns of their own, no number of them has.
    return math.lcm(grain, width) // width if not heads or columns % heads == 0 else 1


def _branch_path(output: fx.Node, attentions: list[fx.Node]) -> str:
    """The module that holds the branch: the parent of its output projection."""
    path = module_path(attentions[0]) if attentions else module_path(output).rpartition(".")[0]
    return path or module_path(output)


def _group(branches: list[Branch]) -> tuple[Layer, ...]:
    layers = []
    for index in range(branches[-1].layer + 1):
        layer_branches = tuple(branch for branch in branches if branch.layer == index)
        path = layer_branches[0].path
        for branch in layer_branches[1:]:
            path = _common_path(path, branch.path)
        layers.append(Layer(index, path if len(layer_branches) > 1 else path.rpartition(".")[0], layer_branches))
    return tuple(layers)


def _common_path(left: str, right: str) -> str:
    common = []
    for one, other in zip(left.split("."), right.split(".")):
        if one != other:
            break
        common.append(one)
    return ".".join(common)


def _head(final: fx.Node, program: Program) -> str:
    """The last projection between the stream and the output, if everything after it is element by element."""
    after = descendants([final])
    gemms = [node for node in program.graph.nodes if node in after and is_gemm(node)]
    return gemms[-1].name if gemms and gemms[-1].target is LINEAR and is_tensor(gemms[-1]) else ""
