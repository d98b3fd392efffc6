"""Reduce the means that lanes take together: one small all-reduce for all of a branch that can wait for each other.

%m = kraken.mean_power(%q, 2, 64)                ->     %h = kraken.all_reduce_start(cat([sum(%q * %q) / 64, ...]))
...                                                     %v = linear(...)          <- what needs no mean, in between
                                                        %m = slice(kraken.wait(%h), 2, 0, 1)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Planned, Program
from kraken_compiler.ir.schedule import Reduce
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import ancestors, args_of, aten
from kraken_compiler.passes.graph_tools import replace as replace_node
from kraken_compiler.passes.shapes import shape_of, value_of

_MEAN = torch.ops.kraken.mean_power.default
_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default


@dataclass(frozen=True)
class ReduceMeans(Pass[Planned]):
    name: ClassVar[str] = "reduce-means"
    requires: ClassVar[type[Program]] = Planned

    def run(self, program: Planned) -> PassResult:
        nodes = {node.name: node for node in program.graph.nodes}
        starts = [node for node in program.graph.nodes if node.target is _START]
        reduces = dict(zip(starts, program.plan.reduces, strict=True))
        branches = {}
        matches = 0
        for branch in program.layers.branches:
            inside = [nodes[name] for name in branch.nodes]
            means = [node for node in inside if node.target is _MEAN]
            if not means:
                continue
            matches += len(means)
            for group in _levels(means, set(inside)):
                payload = sum(value_of(mean).dtype.itemsize for mean in group)
                inside, start = _reduce(group, inside)
                reduces[start] = Reduce(0, branch.index, branch.index, branch.index, (), payload)
            branches[branch] = _names(branch, inside)
        starts = [node for node in program.graph.nodes if node.target is _START]
        all_reduces = tuple(replace(reduces[start], index=index) for index, start in enumerate(starts))
        program.plan = replace(program.plan, reduces=all_reduces)
        program.layers = program.layers.with_nodes(branches)
        return PassResult(matches)


def _names(branch: Branch, inside: list[fx.Node]) -> tuple[str, ...]:
    assert inside[-1].graph is not None
    place = {node: number for number, node in enumerate(inside[-1].graph.nodes)}
    names = tuple(node.name for node in sorted(inside, key=place.__getitem__))
    assert branch.output in names
    return names


def _levels(means: list[fx.Node], inside: set[fx.Node]) -> list[list[fx.Node]]:
    """Groups of means that do not depend on each other; those that they depend on come before them."""
    levels: dict[fx.Node, int] = {}
    for mean in means:
        above = ancestors(mean, within=inside) - {mean}
        levels[mean] = 1 + max((levels[other] for other in above if other in levels), default=-1)
    return [[mean for mean in means if levels[mean] == level] for level in range(max(levels.values()) + 1)]


def _reduce(group: list[fx.Node], inside: list[fx.Node]) -> tuple[list[fx.Node], fx.Node]:
    """Replace the means of a group; returns the branch's nodes and the start."""
    graph, within = group[0].graph, set(inside)
    first = _hoist(group, within)
    new_nodes: list[fx.Node] = []

    def call(target: object, *args: object) -> fx.Node:
        new_nodes.append(graph.call_function(target, args))  # type: ignore[arg-type]
        return new_nodes[-1]

    with graph.inserting_before(first):
        shares = [_share(mean, call) for mean in group]
        operand = shares[0] if len(shares) == 1 else call(aten.cat.default, shares, -1)
        start = call(_START, operand)
        wait_index = len(new_nodes)
        wait = call(_WAIT, start)
        last = len(shape_of(group[0])) - 1
        for place, mean in enumerate(group):
            whole = wait if len(group) == 1 else call(aten.slice.Tensor, wait, last, place, place + 1)
            replace_node(mean, whole)
    _hide(start, new_nodes[wait_index], within - set(group))
    return [*(node for node in inside if node not in set(group)), *new_nodes], start


def _hoist(group: list[fx.Node], within: set[fx.Node]) -> fx.Node:
    """Move the means and what they need in front of the first node that reads one of them; returns that node."""
    place = {node: number for number, node in enumerate(group[0].graph.nodes)}
    first = min((user for mean in group for user in mean.users), key=place.__getitem__)
    needed_nodes = {node for mean in group for node in ancestors(mean, within=within)}
    for node in sorted(needed_nodes, key=place.__getitem__):
        if place[node] > place[first]:
            first.prepend(node)
    return first


def _share(mean: fx.Node, call: object) -> fx.Node:
    """The share of a mean that a lane adds."""
    assert callable(call)
    x, power, width, share = args_of(mean)
    value = x if power == 1 else call(aten.mul.Tensor, x, x)
    value = value if share is None else call(aten.mul.Tensor, value, share)
    total = call(aten.sum.dim_IntList, value, [-1], True)
    result: fx.Node = call(aten.mul.Tensor, total, 1.0 / width)
    return result


def _hide(start: fx.Node, wait: fx.Node, within: set[fx.Node]) -> None:
    """Move the projections that need no mean (the one of the values) between start and wait."""
    start_ancestors = ancestors(start)
    order = list(start.graph.nodes)
    place = {node: number for number, node in enumerate(order)}
    early = [node for node in order if node in within and node.target is LINEAR and node not in start_ancestors]
    if early and place[early[0]] < place[start]:
        for node in order[place[early[0]] :]:
            if node in start_ancestors:
                early[0].prepend(node)
    place = {node: number for number, node in enumerate(start.graph.nodes)}
    late = [node for node in within if node.target is LINEAR and place[node] > place[wait]]
    for linear in sorted(late, key=place.__getitem__):
        above = ancestors(linear)
        if wait in above:
            continue
        for node in sorted(above, key=place.__getitem__):
            if place[node] > place[wait]:
                wait.prepend(node)
