"""Plan the split of every branch over the lanes. An analysis: one probe a structure, reused for its twins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Program, Recognized, Split
from kraken_compiler.ir.shards import BranchShards
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.recognize.projections import Projections, find_projections, known_constants
from kraken_compiler.passes.shard.degrees import valid_degrees
from kraken_compiler.passes.shard.probe import probe_branch
from kraken_compiler.passes.shard.scale_groups import cut_of_scales


@dataclass(frozen=True)
class PlanShards(Pass[Recognized]):
    """Split over `degree` lanes."""

    degree: int = 1

    name: ClassVar[str] = "plan-shards"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        assert self.degree in valid_degrees(program.layers)
        nodes = {node.name: node for node in program.graph.nodes}
        weights = weight_derived(program)
        constants = known_constants(program)
        plans_by_structure: dict[Any, tuple[list[str], BranchShards]] = {}
        plans: list[BranchShards] = []
        for branch in program.layers.branches:
            projections = find_projections(nodes[branch.output], [nodes[name] for name in branch.nodes], weights)
            assert isinstance(projections, Projections)
            names, structure = _structure(projections, branch, constants)
            if structure in plans_by_structure:
                twin_names, twin = plans_by_structure[structure]
                plans.append(_translate(twin, dict(zip(twin_names, names, strict=True)), branch))
                continue
            plan = probe_branch(branch, projections, program, self.degree)
            if isinstance(plan, Rejection):
                return PassResult(len(plans), (plan,))
            rejection = cut_of_scales(projections.output, plan.owned)
            if rejection is not None:
                return PassResult(len(plans), (rejection,))
            plan = replace(plan, structure=len(plans_by_structure))
            plans_by_structure[structure] = (names, plan)
            plans.append(plan)
        return PassResult(len(plans_by_structure), program=program.at(Split, shards=tuple(plans)))


def _structure(
    projections: Projections, branch: Branch, constants: dict[str, torch.Tensor]
) -> tuple[list[str], tuple[Any, ...]]:
    """Names of all nodes a probe sees, in a fixed order, and a key that is equal for branches that probe alike."""
    numbers: dict[fx.Node, int] = {}
    key: list[Any] = [branch.kind, branch.heads, branch.columns, branch.unit]

    def describe(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument not in numbers:
                numbers[argument] = len(numbers)
                constant = constants.get(argument.name)
                key.append((str(_shape(argument)), None if constant is None else str(constant.flatten().tolist())))
            return ("node", numbers[argument])
        if isinstance(argument, (list, tuple)):
            return tuple(describe(element) for element in argument)
        return str(argument)

    for leaf in projections.inputs:
        describe(leaf)
    for node in projections.region:
        keywords = tuple((name, describe(argument)) for name, argument in sorted(node.kwargs.items()))
        key.append((str(node.target), describe(args_of(node)), keywords, describe(node)))
    describe(args_of(projections.output)[0])
    describe(projections.output)
    return [node.name for node in numbers], tuple(key)


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _translate(twin: BranchShards, names: dict[str, str], branch: Branch) -> BranchShards:
    return replace(
        twin,
        branch=branch.index,
        inputs=tuple(names[name] for name in twin.inputs),
        output=names[twin.output],
        region=tuple(names[name] for name in twin.region),
        kept_sets={names[name]: sets for name, sets in twin.kept_sets.items()},
    )
