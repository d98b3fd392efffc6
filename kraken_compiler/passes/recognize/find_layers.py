"""Find the residual stream, the branches on it, and the layers they form. An analysis, by dataflow alone.

The stream is the chain of nodes that dominate the output, seen from the embeddings. A link from p to d of that chain is
a *join* when d is a sum of p and other terms; each other term is the output of one branch. A branch with a
scaled_dot_product_attention in it is an attention branch, any other an FFN branch:

    p ---------------------------------> d = p + term          sequential
    p ---------------------------------> d = p + term + term   parallel attention and FFN
     \\--> norm -> linear -> ... -> linear (output projection) -> term

Norms may follow a branch (sandwich norms: between output projection and term) and the sum itself (post-norm: between d
and the next link); they need complete sums, so they are no part of the branch but kept beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import networkx as nx
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.layers import Branch, Layer, LayerTable, Replay
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.windows import is_gemm
from kraken_compiler.passes.base import Pass, PassResult
from kraken_compiler.passes.graph_tools import (
    ATTENTIONS,
    LINEAR,
    SHAPE_ONLY,
    ancestors,
    args_of,
    aten,
    descendants,
    in_order,
    module_path,
    value_descendants,
)
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.projections import find_part, find_projections
from kraken_compiler.passes.shapes import is_tensor, same_shape, shape_of, value_of


@dataclass(frozen=True)
class FindLayers(Pass):
    name: ClassVar[str] = "find-layers"
    ensures: ClassVar[tuple[str, ...]] = ("layers",)

    def run(self, program: Program) -> PassResult:
        found = _find(program)
        if isinstance(found, Rejection):
            return PassResult(rejections=(found,))
        program.layers = found
        return PassResult(len(found.layers))


@dataclass(frozen=True)
class _Join:
    """`after` is the sum of the stream `before` and the outputs of `terms`."""

    before: fx.Node
    after: fx.Node
    terms: tuple[fx.Node, ...]


def _reject(reason: str, node: fx.Node | None = None, hint: str = "") -> Rejection:
    return Rejection(reason, (node.name,) if node else (), module_path(node) if node else "", hint)


def _find(program: Program) -> LayerTable | Rejection:
    graph = program.graph
    roots = _embeddings(program)
    if not roots:
        return _reject("no embedding lookup and no floating-point input was found, so no residual stream begins")
    hidden = value_descendants(roots)
    output = graph.output_node()
    if output not in hidden:
        return _reject("the output does not depend on the embeddings")
    chain = _dominator_chain(roots, hidden, output)
    joins = _find_joins(chain, hidden)
    first, *more = output.all_input_nodes
    if more and first in hidden:
        own_chain = _dominator_chain(roots, hidden, first)
        own_joins = _find_joins(own_chain, hidden)
        if len(own_joins) > len(joins) and _check_stream(own_chain, own_joins, hidden, graph) is None:
            reason = "besides its first output the model returns values from between its layers"
            return _reject(reason, more[0], "Return only what follows the last layer (no hidden states).")
    if not joins:
        strayed = next((node for node in graph.nodes if node.target in ATTENTIONS), None)
        reason = "no residual stream was found: no sum of a stream and a branch lies on every path to the output"
        return _reject(reason, strayed, _HINT)
    fault = _check_stream(chain, joins, hidden, graph)
    if fault is not None:
        return fault
    return _layer_table(program, joins, hidden - set(roots))


_HINT = (
    "Supported are decoders and encoders whose layers add attention and FFN outputs to one stream; "
    "encoder-decoders and skip connections across layers are not."
)


def _embeddings(program: Program) -> list[fx.Node]:
    """Where the stream begins: weight lookups by the user's indices, or else the user's floating-point inputs."""
    names = {spec.name for spec in program.inputs}
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    by_value = set(inputs)
    for node in program.graph.nodes:
        if node.target not in SHAPE_ONLY and any(operand in by_value for operand in node.all_input_nodes):
            by_value.add(node)
    lookups = [
        node
        for node in program.graph.nodes
        if node.target is aten.embedding.default and args_of(node)[1] in by_value and value_of(node).is_floating_point()
    ]
    return lookups or [node for node in inputs if value_of(node).is_floating_point()]


def _dominator_chain(roots: list[fx.Node], hidden: set[fx.Node], output: fx.Node) -> list[fx.Node]:
    """The nodes that lie on every path from the embeddings to the output, first to last."""
    flow = nx.DiGraph()
    flow.add_edges_from(("start", root) for root in roots)
    flow.add_edges_from((node, user) for node in hidden for user in node.users if user in hidden)
    dominator = nx.immediate_dominators(flow, "start")
    chain: list[fx.Node] = []
    node: Any = output
    while node != "start":
        chain.append(node)
        node = dominator[node]
    return chain[::-1]


def _find_joins(chain: list[fx.Node], hidden: set[fx.Node]) -> list[_Join]:
    joins = []
    for before, after in itertools.pairwise(chain):
        terms = _terms(after, before, hidden)
        if terms.count(before) != 1 or len(terms) < 2 or any(term not in hidden for term in terms):
            continue
        others = tuple(term for term in terms if term is not before)
        # The sum of two embeddings is no join: neither is computed from the other.
        if all(_depends_on(term, before, hidden) for term in others):
            joins.append(_Join(before, after, others))
    return joins


def _depends_on(node: fx.Node, stream: fx.Node, hidden: set[fx.Node]) -> bool:
    return any(stream in above.all_input_nodes for above in ancestors(node, {stream}, hidden))


def _terms(node: fx.Node, stream: fx.Node, hidden: set[fx.Node]) -> list[fx.Node]:
    """The summands of `node`, nested sums opened as long as nobody else reads them."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return [node]
    terms: list[fx.Node] = []
    for operand in args_of(node)[:2]:
        if not isinstance(operand, fx.Node):
            return [node]
        nested = operand is not stream and operand in hidden and len(operand.users) == 1
        terms += _terms(operand, stream, hidden) if nested else [operand]
    return terms


def _check_stream(chain: list[fx.Node], joins: list[_Join], hidden: set[fx.Node], graph: fx.Graph) -> Rejection | None:
    """Everything between the first and the last join must be joins, and all attention must be inside them."""
    for left, right in itertools.pairwise(joins):
        if left.after is not right.before:
            between = ancestors(right.before, {left.after}, hidden) & hidden
            if any(is_gemm(node) for node in between) or not same_shape(left.after, right.before):
                first = chain[chain.index(left.after) + 1]
                reason = "the residual stream is rewritten between layers, not only added to or normalised"
                return _reject(reason, first, _HINT)
    inside = {node for join in joins for term in join.terms for node in ancestors(term, {join.before}, hidden)}
    for node in graph.nodes:
        if node.target in ATTENTIONS and node not in inside:
            reason = "an attention lies outside the layers of the one residual stream that reaches the output"
            return _reject(reason, node, _HINT)
    return None


def _layer_table(program: Program, joins: list[_Join], hidden: set[fx.Node]) -> LayerTable | Rejection:
    weights = weight_derived(program)
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    branches: list[Branch] = []
    points = [(0, joins[0].before.name)]
    layer = -1
    afters = [_replay(left.after, right.before, hidden, place) for left, right in itertools.pairwise(joins)]
    for join, after in zip(joins, [*afters, None], strict=True):
        reads = len(branches)
        measured = []
        for term in join.terms:
            above = in_order(place, ancestors(term, {join.before}, hidden))
            part = find_part(term, above, join.before, weights)
            if part is not term and not same_shape(part, join.before):
                reason = "what follows the branch's output projection does not leave it in the shape of the stream"
                return _reject(reason, part)
            nodes = in_order(place, ancestors(part, {join.before}, hidden))
            attentions = [node for node in nodes if node.target in ATTENTIONS]
            if len(attentions) > 1:
                return _reject("a branch holds more than one attention", attentions[1])
            found = find_projections(part, nodes, weights, join.before)
            if isinstance(found, Rejection):
                return found
            measured.append((not attentions, nodes, part, attentions, found, _replay(part, term, hidden, place)))
        # Where attention and FFN are parallel, attention goes first: a form may let the FFN read it.
        for is_ffn, nodes, part, attentions, found, post in sorted(measured, key=lambda entry: entry[0]):
            if attentions or layer < 0:
                layer += 1
            heads = _heads(attentions[0]) if attentions else 0
            branches.append(
                Branch(
                    index=len(branches) + 1,
                    layer=layer,
                    kind="ffn" if is_ffn else "attention",
                    path=_branch_path(found.output, attentions),
                    stream=join.before.name,
                    reads=reads,
                    output=part.name,
                    nodes=tuple(node.name for node in nodes),
                    heads=heads,
                    kv_heads=found.kv_heads(attentions[0], program) if attentions else 0,
                    columns=int(shape_of(args_of(found.output)[0])[-1]),
                    post=post,
                )
            )
        branches[-1] = replace(branches[-1], after=after)
        points.append((len(branches), after.nodes[-1] if after else join.after.name))
    if not any(branch.kind == "attention" for branch in branches):
        return _reject("no branch of the residual stream holds an attention", joins[0].after, _ATTENTION_HINT)
    return LayerTable(
        embedding=joins[0].before.name,
        joins=tuple(points),
        final=joins[-1].after.name,
        head=_head(joins[-1].after, program),
        layers=_group(branches),
    )


def _replay(source: fx.Node, result: fx.Node, hidden: set[fx.Node], place: dict[fx.Node, int]) -> Replay | None:
    """What makes `result` out of `source`; None if they are the same."""
    nodes = in_order(place, ancestors(result, {source}, hidden))
    return Replay(source.name, tuple(node.name for node in nodes)) if nodes else None


_ATTENTION_HINT = (
    "Attention must be a scaled_dot_product_attention or softmax(q k^T + mask) v over [batch, heads, ...]."
)


def _heads(attention: fx.Node) -> int:
    return int(shape_of(attention)[-3])


def _branch_path(output: fx.Node, attentions: list[fx.Node]) -> str:
    """The module that holds the branch: the parent of its output projection."""
    path = module_path(attentions[0]) if attentions else module_path(output).rpartition(".")[0]
    return path or module_path(output)


def _group(branches: list[Branch]) -> tuple[Layer, ...]:
    layers = []
    for index in range(branches[-1].layer + 1):
        mine = tuple(branch for branch in branches if branch.layer == index)
        path = mine[0].path
        for branch in mine[1:]:
            path = _common_path(path, branch.path)
        layers.append(Layer(index, path if len(mine) > 1 else path.rpartition(".")[0], mine))
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
