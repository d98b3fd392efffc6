"""Give a branch its own copies of what something outside it reads too, so that cutting them changes nothing there.

    %kv = linear(%x, %w)                                       %kv = linear(%x, %w)         whole on every lane
    %latent, %rotary = split(%kv, [16, 8])             ->      %latent = split(%kv, [16, 8])[0]
    %key = cat([up(%latent), expand(%rotary)])                 %own = split(%kv, [16, 8])[1]
                                                               %key = cat([up(%latent), expand(%own)])

Copied is what lies behind the projection that both read. It is layout and element by element; where lanes need all of
it, nothing has to be copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.ir.shards import BranchShards
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import ancestors
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.projections import Projections, find_projections


@dataclass(frozen=True)
class CopyShared(Pass[Split]):
    name: ClassVar[str] = "copy-shared"
    requires: ClassVar[type[Program]] = Split

    def run(self, program: Split) -> PassResult:
        if program.degree > 1:
            return PassResult()
        nodes = {node.name: node for node in program.graph.nodes}
        weights = weight_derived(program)
        plans: list[BranchShards] = []
        branches: dict[Branch, tuple[str, ...]] = {}
        matches = 0
        for branch, plan in zip(program.layers.branches, program.shards, strict=True):
            projections = find_projections(nodes[branch.output], [nodes[name] for name in branch.nodes], weights)
            assert isinstance(projections, Projections)
            is_cut = any(node.name in plan.kept_sets for node in (*projections.whole, *projections.shared))
            copies = _copy(projections) if is_cut else {}
            matches += len(copies)
            names = {old.name: new.name for old, new in copies.items()}
            plans.append(_rename(plan, names))
            # What only others read by now may be cut otherwise for them.
            needed_names = {node.name for node in ancestors(nodes[branch.output])} if copies else set(branch.nodes)
            branches[branch] = tuple(
                one
                for name in branch.nodes
                for one in dict.fromkeys((name, names.get(name, name)))
                if one in needed_names
            )
        program.shards = tuple(plans)
        program.layers = program.layers.with_nodes(branches)
        return PassResult(matches)


def _copy(projections: Projections) -> dict[fx.Node, fx.Node]:
    """Copies of the shared nodes, which the rest of the branch's region reads in place of them."""
    copies: dict[fx.Node, fx.Node] = {}
    for node in projections.shared:
        with node.graph.inserting_after(node):
            copies[node] = node.graph.node_copy(node, lambda operand: copies.get(operand, operand))
        copies[node].meta = dict(node.meta)
    own = {node for node in (*projections.region, projections.output) if node not in copies}
    for node, copy in copies.items():
        for user in list(node.users):
            if user in own:
                user.replace_input_with(node, copy)
    return copies


def _rename(plan: BranchShards, names: dict[str, str]) -> BranchShards:
    """The plan with the copies' names in its region; what its branch's own projections are called stays."""
    if not names:
        return plan
    return replace(
        plan,
        region=tuple(names.get(name, name) for name in plan.region),
        kept_sets={names.get(name, name): sets for name, sets in plan.kept_sets.items()},
    )
