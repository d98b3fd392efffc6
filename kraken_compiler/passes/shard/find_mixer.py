"""Name the operator that keeps a branch from being divided: the one that reads what several lanes would compute.

What a probe notices is an effect of it (a part that is no block, columns that all heads reach), often far behind.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.shards import Kept
from kraken_compiler.passes.choosing import WHERE
from kraken_compiler.passes.graph_tools import aten, module_path
from kraken_compiler.passes.probing import Region
from kraken_compiler.passes.shapes import is_tensor, same_shape
from kraken_compiler.passes.shard.degrees import DEGREE_HINT

_HINT = (
    "Between their projections, attention must keep its heads apart and an FFN its columns: "
    "replace the operator by one that works on each alone."
)
_MOVES = frozenset({aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.unsqueeze.default})


def mixing(node: fx.Node, parts: str) -> Rejection:
    """The rejection for an operator that mixes `parts` ("heads" or "columns")."""
    reason = f"it mixes the {parts} that would be divided among the lanes"
    return Rejection(reason, (node.name,), module_path(node), _HINT)


def breaking(nodes: Sequence[fx.Node], kept_sets: Mapping[str, Kept], reasons: Mapping[fx.Node, str]) -> Rejection:
    """The rejection for the last node that makes parts for lanes of what has none.

    Args:
        nodes: The nodes between a branch's projections, in graph order.
        kept_sets: Kept sets by node name.
        reasons: The nodes of which lanes need no parts that can be theirs, and why.
    """
    for node in reversed(nodes):
        if is_tensor(node) and any(_is_elsewhere(operand, node, kept_sets) for operand in node.all_input_nodes):
            reason = f"'{operator_name(node)}' moves heads or columns from one lane to another"
            return Rejection(reason, (node.name,), module_path(node), DEGREE_HINT)
    for node in reversed(nodes):
        cause = next((reasons[operand] for operand in node.all_input_nodes if operand in reasons), None)
        whole = node not in reasons and not any(
            user in reasons for user in node.users if user.target is operator.getitem
        )
        if cause is not None and whole:
            return Rejection(f"{cause} ('{operator_name(node)}')", (node.name,), module_path(node), DEGREE_HINT)
    node, reason = next(iter(reasons.items()))
    return Rejection(reason.replace("its operand", "it"), (node.name,), module_path(node), DEGREE_HINT)


def _is_elsewhere(operand: fx.Node, node: fx.Node, kept_sets: Mapping[str, Kept]) -> bool:
    """True if lanes need another part of an operand than of a result of the same shape."""
    are_comparable = operand.name in kept_sets and node.name in kept_sets and same_shape(operand, node)
    return are_comparable and node.target not in _MOVES and kept_sets[operand.name] != kept_sets[node.name]


def operator_name(node: fx.Node) -> str:
    """The name of an operator, without what is always the same."""
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def mixer_of_heads(region: Region, attention: fx.Node, groups: Sequence[Sequence[int]]) -> fx.Node | None:
    """The first node after the attention with an element that depends on the heads of several lanes.

    Args:
        region: The branch between its projections.
        attention: Its attention.
        groups: The heads that each lane owns.
    """
    before = region.run()
    lane_counts: dict[fx.Node, Tensor] = {}
    for heads in groups:
        noisy = region.inputs[attention].clone()
        noisy[:, heads] += torch.rand_like(noisy[:, heads]).add(0.5)
        after = region.run({attention: noisy})
        for node in region.nodes:
            if isinstance(before[node], Tensor):
                lane_counts[node] = lane_counts.get(node, torch.tensor(0)) + (before[node] != after[node]).int()
    return next((node for node in region.nodes if node in lane_counts and bool((lane_counts[node] > 1).any())), None)


def mixer_of_columns(nodes: Sequence[fx.Node], kept_sets: Mapping[str, Kept]) -> fx.Node | None:
    """The node through which a lane's columns of an FFN need those of other lanes; None if they do not.

    Where they do, a lane needs all of a tensor whose shape that of its part is.

    Args:
        nodes: The nodes between the FFN's projections, in graph order.
        kept_sets: Kept sets by node name.
    """
    parts = [node for node in nodes if node.name in kept_sets]
    cuts = [node for node in nodes if _needs_all(node, kept_sets)]
    if not cuts:
        return None
    for node in cuts:
        if not _is_element_by_element(node):
            return node
    inside, seen, todo = set(nodes), set(parts), parts
    while todo:
        above = [one for one in todo[0].all_input_nodes if one in inside and one not in seen]
        mixer = next((node for node in above if not _is_element_by_element(node)), None)
        if mixer is not None:
            return mixer
        seen.update(above)
        todo = [*todo[1:], *above]
    return cuts[0]


def _needs_all(node: fx.Node, kept_sets: Mapping[str, Kept]) -> bool:
    if node.target in _MOVES:
        return False
    # A sort gives two tensors.
    results = [node] if is_tensor(node) else [user for user in node.users if user.target is operator.getitem]
    results = [result for result in results if result.name in kept_sets]
    whole = [operand for operand in node.all_input_nodes if operand.name not in kept_sets and is_tensor(operand)]
    return any(same_shape(operand, result) for operand in whole for result in results)


def _is_element_by_element(node: fx.Node) -> bool:
    # torch tags only some overloads of `where` as pointwise.
    if node.target is operator.getitem or node.target in _MOVES or node.target in WHERE:
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())
