"""Name the value that is read past the residual stream where no stream, or not all of it, was found.

Keys that a later layer reads again, or an embedding that every layer mixes in, take the sums that a stream is made of
off the one path that everything goes. The sums are still there: a chain of them, each with a term computed from the one
before, says where the stream would be, and what a term reads from before that is what bypasses it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.passes.graph_tools import ancestors, args_of, aten, descendants, module_path
from kraken_compiler.passes.shapes import is_tensor, same_shape


@dataclass(frozen=True)
class _Sum:
    """A sum `after` of `before` and what has been computed from it."""

    before: fx.Node
    after: fx.Node
    depth: int


def find_bypass(graph: fx.Graph, hidden: Set[fx.Node], hint: str) -> Rejection | None:
    """The rejection for the first value that a later layer reads past the stream; None if there is none.

    Args:
        graph: The graph.
        hidden: The nodes that depend on the embeddings.
        hint: What it says is supported.
    """
    for link in _longest_chain(graph, hidden):
        behind = descendants([link.before])
        inside = ancestors(link.after, {link.before}, hidden) & hidden
        bypassing = [
            node
            for node in inside - behind
            if is_tensor(node) and any(user in inside and user in behind for user in node.users)
        ]
        if bypassing:
            node = min(bypassing)
            return _rejection(node, min(user for user in node.users if user in inside and user in behind), hint)
    return None


def _rejection(node: fx.Node, reader: fx.Node, hint: str) -> Rejection:
    path = module_path(reader)
    place = f"'{path}' (node {reader.name})" if path else f"node {reader.name}"
    reason = f"no residual stream was found: {place} reads this past the sums, so that it belongs to no branch alone"
    return Rejection(reason, (node.name,), module_path(node), hint)


def _longest_chain(graph: fx.Graph, hidden: Set[fx.Node]) -> list[_Sum]:
    """The sums that follow from each other, first to last, two of them at least."""
    sums: dict[fx.Node, _Sum] = {}
    for node in graph.nodes:
        link = _sum(node, sums, hidden) if node.target is aten.add.Tensor and node in hidden else None
        if link is not None:
            sums[node] = link
    last = max(sums.values(), key=lambda link: link.depth, default=None)
    chain: list[_Sum] = []
    while last is not None:
        chain.append(last)
        last = sums.get(last.before)
    return chain[::-1] if len(chain) > 1 else []


def _sum(node: fx.Node, sums: dict[fx.Node, _Sum], hidden: Set[fx.Node]) -> _Sum | None:
    left, right = args_of(node)[:2]
    if left not in hidden or right not in hidden or not same_shape(left, right):
        return None
    for before, term in ((left, right), (right, left)):
        above = ancestors(term, within=hidden)
        if before in above and before is not term:
            return _Sum(before, node, sums[before].depth + 1 if before in sums else 1)
        # Of a parallel block, the second term is computed from what the first was added to.
        if before in sums and sums[before].before in above:
            return _Sum(sums[before].before, node, sums[before].depth)
    return None
