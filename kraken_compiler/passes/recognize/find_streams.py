"""Find the residual streams of a model: one, or an encoder's and a decoder's. By dataflow alone.

A stream is the chain of nodes that dominate its end, seen from the embeddings. A link from p to d of that chain is a
join when d is a sum of p and other terms that are computed from it.

    tokens -> p ---> d ---> ... ---> the output                         one stream
    tokens -> p ---> d ---> ... ---> context                            an encoder
                                        |  keys and values of cross-attention
    tokens -> p ---> d -----------> d --+--> ... ---> the output        its decoder

Two streams are told apart by the inputs that they begin with. All that a decoder reads of its encoder must come
through one node, the encoder's result; everything before it is computed once, everything behind it (the projections of
the keys and values) belongs to the decoder's branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.windows import is_gemm
from kraken_compiler.ops.op_sets import ATTENTIONS, SHAPE_ONLY
from kraken_compiler.passes.graph_tools import ancestors, args_of, aten, descendants, module_path, value_descendants
from kraken_compiler.passes.recognize.find_bypass import find_bypass
from kraken_compiler.passes.shapes import same_shape, value_of


@dataclass(frozen=True)
class Join:
    """The sum `after` of the stream `before` and the outputs of `terms`."""

    before: fx.Node
    after: fx.Node
    terms: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stream:
    """One residual stream.

    Attributes:
        joins: Its joins, in order.
        hidden: The nodes that its branches and norms may hold.
        context: The encoder's result, if its branches read one.
    """

    joins: tuple[Join, ...]
    hidden: frozenset[fx.Node]
    context: fx.Node | None = None


def find_streams(program: Program) -> tuple[Stream, ...] | Rejection:
    """The residual streams in order of execution: one, or the encoder's and the decoder's."""
    stream = _one_stream(program)
    if isinstance(stream, Stream):
        return (stream,)
    return _encoder_and_decoder(program) or stream


def _one_stream(program: Program) -> Stream | Rejection:
    graph = program.graph
    roots = _embeddings(program)
    if not roots:
        return _reject("no embedding lookup and no floating-point input was found, so no residual stream begins")
    hidden = value_descendants(roots)
    output = graph.output_node()
    if output not in hidden:
        return _reject("the output does not depend on the embeddings")
    chain = _dominator_chain(roots, hidden, [output])
    joins = _find_joins(chain, hidden)
    first, *more = output.all_input_nodes
    if more and first in hidden:
        own_chain = _dominator_chain(roots, hidden, [first])
        own_joins = _find_joins(own_chain, hidden)
        fault = _check_stream(own_chain, own_joins, hidden) or _stray_attention([own_joins], [hidden], graph)
        if len(own_joins) > len(joins) and fault is None:
            return _reject(_BETWEEN, more[0], "Return only what follows the last layer (no hidden states).")
    if not joins:
        attention = next((node for node in graph.nodes if node.target in ATTENTIONS), None)
        reason = "no residual stream was found: no sum of a stream and a branch lies on every path to the output"
        return find_bypass(graph, hidden, _HINT) or _reject(reason, attention, _HINT)
    fault = _check_stream(chain, joins, hidden)
    if fault is None and (stray := _stray_attention([joins], [hidden], graph)) is not None:
        fault = find_bypass(graph, hidden, _HINT) or stray
    return fault or Stream(tuple(joins), frozenset(hidden) - set(roots))


_BETWEEN = "besides its first output the model returns values from between its layers"
_HINT = (
    "Supported are decoders and encoders whose layers add attention and FFN outputs to one stream, and "
    "encoder-decoders whose two streams begin with inputs of their own; skip connections across layers and "
    "keys or values that layers share are not."
)


def _encoder_and_decoder(program: Program) -> tuple[Stream, Stream] | Rejection | None:
    """The two streams; None if no part of the model looks like a decoder."""
    graph, output = program.graph, program.graph.output_node()
    groups = _roots_by_input(program)
    for late in groups.values():
        early = [root for group in groups.values() if group is not late for root in group]
        hidden = value_descendants(late)
        if not early or output not in hidden or hidden & set(early):
            continue
        chain = _dominator_chain(late, hidden, [output])
        joins = _find_joins(chain, hidden)
        source = value_descendants(early) - hidden
        context_nodes = {operand for node in hidden for operand in node.all_input_nodes if operand in source}
        branches = _inside(joins, hidden)
        if not any(operand in context_nodes for node in branches for operand in node.all_input_nodes):
            continue
        encoder_chain = _dominator_chain(early, source, sorted(context_nodes))
        encoder_joins = _find_joins(encoder_chain, source)
        if not encoder_joins:
            reason = "what the decoder reads of the other inputs does not come from one residual stream"
            return _reject(reason, min(context_nodes), _HINT)
        fault = _check_stream(chain, joins, hidden) or _check_stream(encoder_chain, encoder_joins, source)
        fault = fault or _stray_attention([encoder_joins, joins], [source, hidden], graph)
        context = encoder_chain[-1]
        behind = descendants([context]) & source
        inside = _inside(joins, hidden | behind - {context})
        inner_output = next((node for node in output.all_input_nodes if node in inside), None)
        if fault is None and inner_output is not None:
            fault = _reject(
                _BETWEEN, inner_output, "Return only what follows the last layer (no hidden states, no caches)."
            )
        if fault is not None:
            return fault
        encoder = Stream(tuple(encoder_joins), frozenset(source - set(early)))
        return encoder, Stream(tuple(joins), frozenset((hidden | behind) - {context, *late}), context)
    return None


def _embeddings(program: Program) -> list[fx.Node]:
    """The roots of the stream: weight lookups by the user's indices, or else the user's floating-point inputs."""
    inputs = _inputs(program)
    return _lookups(program, inputs) or [node for node in inputs if value_of(node).is_floating_point()]


def _roots_by_input(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """The weight lookups by every input, or the input itself if its values are used as they are."""
    inputs = _inputs(program)
    groups = {node: [node] if value_of(node).is_floating_point() else _lookups(program, [node]) for node in inputs}
    return {node: roots for node, roots in groups.items() if roots}


def _inputs(program: Program) -> list[fx.Node]:
    names = {spec.name for spec in program.inputs}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _lookups(program: Program, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Weight lookups by the values of `inputs`."""
    by_value = set(inputs)
    lookups = []
    for node in program.graph.nodes:
        if node.target in SHAPE_ONLY or not any(operand in by_value for operand in node.all_input_nodes):
            continue
        # What is looked up by what was looked up is no second beginning.
        if node.target is aten.embedding.default and value_of(node).is_floating_point():
            lookups.append(node)
        else:
            by_value.add(node)
    return lookups


def _dominator_chain(roots: Iterable[fx.Node], hidden: set[fx.Node], ends: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that lie on every path from the roots to an end, first to last."""
    flow = nx.DiGraph()
    flow.add_edges_from(("start", root) for root in roots)
    flow.add_edges_from((node, user) for node in hidden for user in node.users if user in hidden)
    flow.add_edges_from((end, "end") for end in ends)
    dominator = nx.immediate_dominators(flow, "start")
    chain: list[fx.Node] = []
    node: Any = dominator["end"]
    while node != "start":
        chain.append(node)
        node = dominator[node]
    return chain[::-1]


def _find_joins(chain: list[fx.Node], hidden: set[fx.Node]) -> list[Join]:
    joins = []
    for before, after in itertools.pairwise(chain):
        terms = _terms(after, before, hidden)
        if terms.count(before) != 1 or len(terms) < 2 or any(term not in hidden for term in terms):
            continue
        others = tuple(term for term in terms if term is not before)
        # The sum of two embeddings is no join: neither is computed from the other. Nor is what no weights multiply.
        if all(_is_branch(term, before, hidden) for term in others):
            joins.append(Join(before, after, others))
    return joins


def _is_branch(node: fx.Node, stream: fx.Node, hidden: set[fx.Node]) -> bool:
    above = ancestors(node, {stream}, hidden)
    return any(stream in one.all_input_nodes for one in above) and any(map(is_gemm, above))


def _terms(node: fx.Node, stream: fx.Node, hidden: set[fx.Node]) -> list[fx.Node]:
    """The summands of `node`, nested sums opened as long as nobody else reads them."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return [node]
    terms: list[fx.Node] = []
    for operand in args_of(node)[:2]:
        if not isinstance(operand, fx.Node):
            return [node]
        is_nested = operand is not stream and operand in hidden and len(operand.users) == 1
        terms += _terms(operand, stream, hidden) if is_nested else [operand]
    return terms


def _check_stream(chain: list[fx.Node], joins: list[Join], hidden: set[fx.Node]) -> Rejection | None:
    """The rejection of a stream with links other than joins and what is done to the whole of it; None without any."""
    for left, right in itertools.pairwise(joins):
        if left.after is not right.before:
            between = ancestors(right.before, {left.after}, hidden) & hidden
            if any(is_gemm(node) for node in between) or not same_shape(left.after, right.before):
                first = chain[chain.index(left.after) + 1]
                reason = "the residual stream is rewritten between layers, not only added to or normalised"
                return _reject(reason, first, _HINT)
    return None


def _stray_attention(joins: Sequence[list[Join]], hidden: Sequence[set[fx.Node]], graph: fx.Graph) -> Rejection | None:
    """The rejection of an attention outside the branches of the streams; None if there is none."""
    inside = {node for own, around in zip(joins, hidden, strict=True) for node in _inside(own, around)}
    for node in graph.nodes:
        if node.target in ATTENTIONS and node not in inside:
            reason = "an attention lies outside the layers of the one residual stream that reaches the output"
            return _reject(reason, node, _HINT)
    return None


def _inside(joins: Iterable[Join], hidden: set[fx.Node]) -> set[fx.Node]:
    """The nodes of all branches."""
    return {node for join in joins for term in join.terms for node in ancestors(term, {join.before}, hidden)}


def _reject(reason: str, node: fx.Node | None = None, hint: str = "") -> Rejection:
    return Rejection(reason, (node.name,) if node else (), module_path(node) if node else "", hint)
