"""Cut every branch to one lane: its weights, its literal sizes, and what it reads from outside.

    %q = linear(%n, %w)            [b, s, 64]        ->     %q = linear(%n, %w_lane)       [b, s, 16]
    %r = reshape(%q, [b, s, 8, 8])                          %r = reshape(%q, [b, s, 2, 8])
    %y = linear(%a, %o, %bias)                              %y = linear(%a, %o_lane, %bias / 4)

After this pass a branch's output is the lane's *part* of the branch's output; the sum over lanes is the whole. Every
distinct structure is checked on numbers: each lane's part, computed from its slices, equals the slice of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import to_indices
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.ir.shards import BranchShards, Kept
from kraken_compiler.ir.weight_table import DimShard
from kraken_compiler.ops.op_sets import ATTENTIONS
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import ancestors, args_of, argument, module_path
from kraken_compiler.passes.probing import Region
from kraken_compiler.passes.recognize.projections import known_constants
from kraken_compiler.passes.shapes import refresh_shapes, same_size, shape_of
from kraken_compiler.passes.shard.degrees import DEGREE_HINT
from kraken_compiler.passes.shard.find_mixer import mixer_of_columns, mixing, operator_name
from kraken_compiler.passes.shard.localize import localize
from kraken_compiler.passes.shard.split_weights import WeightSplitter, original_shapes, weight_kept


@dataclass(frozen=True)
class SplitBranches(Pass[Split]):
    """Cut to one of `degree` lanes."""

    degree: int = 1

    name: ClassVar[str] = "split-branches"
    requires: ClassVar[type[Program]] = Split

    def run(self, program: Split) -> PassResult:
        if program.degree == self.degree:
            return PassResult()
        shapes = original_shapes(program)
        splitter = WeightSplitter(program, shapes)
        nodes = {node.name: node for node in program.graph.nodes}
        firsts: dict[int, BranchShards] = {}
        checks: dict[int, _Check] = {}
        branches = {}
        for branch, plan in zip(program.layers.branches, program.shards, strict=True):
            region = [nodes[name] for name in plan.region]
            leaves = [nodes[name] for name in plan.inputs]
            is_first = firsts.setdefault(plan.structure, plan) is plan
            check = _Check(plan, leaves, region, nodes[plan.output], program) if is_first else None
            parts = _split(plan, nodes, shapes, splitter, check)
            if isinstance(parts, Rejection):
                return PassResult(rejections=(parts,))
            if check is not None:
                checks[plan.structure] = check
            # What a lane cuts out of the stream itself is cut out of whatever the branch will read in its place.
            names = (branch.stream, *branch.nodes)
            branches[branch] = tuple(one for name in names for one in (name, *parts.get(name, ())))[1:]
        program.degree = self.degree
        program.layers = program.layers.with_nodes(branches)
        sort_weights(program)
        culprit = _refresh(program, nodes, shapes, firsts)
        if culprit is not None:
            rejection = next((check.rejection(culprit) for check in checks.values() if culprit in check.region), None)
            rejection = rejection or _not_by_parts(culprit)
        else:
            rejection = next(filter(None, (check.run() for check in checks.values())), None)
        return PassResult(len(program.shards), (rejection,) if rejection else ())


def _split(
    plan: BranchShards,
    nodes: dict[str, fx.Node],
    shapes: dict[str, tuple[Any, ...]],
    splitter: WeightSplitter,
    check: _Check | None,
) -> Rejection | dict[str, tuple[str, ...]]:
    """Cut one branch; returns the nodes that cut a lane's part out of what is computed, by the name of that."""
    constants = known_constants(splitter.program)
    parts: dict[str, tuple[str, ...]] = {}
    degree = len(plan.columns)
    for name in plan.inputs:
        _split_input(nodes[name], plan.kept_sets.get(name), shapes, splitter)
    inside = {*plan.inputs, *plan.region}
    for name in plan.region:
        node = nodes[name]
        new_values = localize(node, plan.kept_sets, shapes, constants)
        if isinstance(new_values, Rejection):
            return new_values
        for constant, value in new_values.items():
            _use(node, constant, _add_numbers(constant, value, splitter), check)
        for operand in node.all_input_nodes:
            if operand.name not in inside and operand.name in plan.kept_sets:
                part = splitter.part(operand, plan.kept_sets[operand.name])
                calls = (step for step in ancestors(part, {operand}) if step.op == "call_function")
                parts[operand.name] = tuple(step.name for step in sorted(calls))
                _use(node, operand, part, check)
    output = nodes[plan.output]
    weight, bias = args_of(output)[1], argument(output, 2, "bias")
    assert isinstance(weight, fx.Node)
    rank = len(shapes[weight.name])
    kept_sets = weight_kept(rank, rank - 1, plan.owned, int(shapes[weight.name][-1]))
    # Every lane adds its N-th, so that the sum over lanes adds the bias once.
    share = splitter.part(bias, (None,) * (rank - 1), scale=1.0 / degree) if bias is not None else None
    _rebind(output, splitter.part(weight, kept_sets), share)
    return parts


def _add_numbers(constant: fx.Node, value: Tensor, splitter: WeightSplitter) -> fx.Node:
    """New values for a constant: of its own shape, or with one more dim in front that has a row for every lane."""
    source = f"kraken.{constant.name}.{value.flatten().tolist()}".replace(" ", "")
    lanes: tuple[DimShard, ...] = ()
    if value.dim() > len(shape_of(constant)):
        length = value.shape[1]
        lanes = (DimShard(0, tuple(((start, start + length),) for start in range(0, value.numel(), length))),)
        value = value.flatten()
    return splitter.add_constant(source, value, lanes)


def _split_input(
    node: fx.Node, kept_sets: Kept | None, shapes: dict[str, tuple[Any, ...]], splitter: WeightSplitter
) -> None:
    lanes = kept_sets[-1] if kept_sets else None
    if lanes is None:
        return
    weight, bias = args_of(node)[1], argument(node, 2, "bias")
    experts: Kept = (None,) * (len(shapes[weight.name]) - 2)
    part = splitter.part(bias, (*experts, lanes)) if bias is not None else None
    _rebind(node, splitter.part(weight, (*experts, lanes, None)), part)


def _rebind(projection: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    x, rest = args_of(projection)[0], args_of(projection)[3:]
    projection.args, projection.kwargs = (x, weight, bias, *rest), {}


def _use(node: fx.Node, old: fx.Node, new: fx.Node, check: _Check | None) -> None:
    node.replace_input_with(old, new)
    if check is not None:
        check.originals[new] = old


def _refresh(
    program: Split, nodes: dict[str, fx.Node], shapes: dict[str, tuple[Any, ...]], firsts: dict[int, BranchShards]
) -> fx.Node | None:
    """Recompute shapes, once a structure; gives the first node whose shape on a lane is not the one the plan says."""
    twins: dict[fx.Node, fx.Node] = {}
    for plan in program.shards:
        first = firsts[plan.structure]
        for name, of_first in zip((*plan.inputs, *plan.region), (*first.inputs, *first.region), strict=True):
            del nodes[name].meta["val"]
            if plan is not first:
                twins[nodes[name]] = nodes[of_first]
    expected_sizes = {}
    for plan in firsts.values():
        for name in (*plan.inputs, *plan.region):
            if name in shapes:
                whole, sets = shapes[name], plan.kept_sets.get(name)
                expected_sizes[name] = [
                    sum(stop - start for start, stop in lanes[0]) if lanes else length
                    for length, lanes in zip(whole, sets or (None,) * len(whole))
                ]
    failed_node: fx.Node | None = None
    try:
        with compat.silent_log("torch._subclasses.fake_tensor"):
            refresh_shapes(program.graph, skip=twins)
    except (RuntimeError, ValueError, IndexError):
        shapeless_calls = (
            node for node in program.graph.nodes if node.op == "call_function" and "val" not in node.meta
        )
        failed_node = next(node for node in shapeless_calls if node not in twins)
    for name, sizes in expected_sizes.items():
        if nodes[name] is failed_node or "val" not in nodes[name].meta:
            continue
        shape = shape_of(nodes[name])
        if len(shape) != len(sizes) or not all(map(same_size, shape, sizes)):
            return nodes[name]
    if failed_node is not None:
        return failed_node
    for twin, model in twins.items():
        twin.meta["val"] = model.meta["val"]
    return None


def _not_by_parts(node: fx.Node) -> Rejection:
    reason = (
        f"'{operator_name(node)}' does not give a lane its heads or columns when it is given only those of the lane"
    )
    return Rejection(reason, (node.name,), module_path(node), DEGREE_HINT)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9, atol=1e-9)


class _Check:
    """One structure on numbers: the branch's core on every lane against the whole."""

    def __init__(
        self, plan: BranchShards, leaves: list[fx.Node], region: list[fx.Node], output: fx.Node, program: Program
    ) -> None:
        self.plan, self.leaves, self.region, self.output = plan, leaves, region, output
        self.originals: dict[fx.Node, fx.Node] = {}
        self._program = program
        whole = Region(region, leaves, known_constants(program), seed=1)
        self._inputs = whole.inputs
        self._whole = whole.run()
        self._mixer = mixer_of_columns(region, plan.kept_sets)
        self._parts = "heads" if any(leaf.target in ATTENTIONS for leaf in region) else "columns"

    def run(self) -> Rejection | None:
        for lane in range(self._program.degree):
            local = Region(self.region, self.leaves, known_constants(self._program, lane), seed=1)
            values = {}
            for node in (*self.leaves, *local.externals):
                source = self.originals.get(node, node)
                if source is not node and source.name not in self.plan.kept_sets:
                    continue
                values[node] = self._cut(self._inputs[source], source.name, lane)
            source = args_of(self.output)[0]
            parts = local.run(values)
            expected = self._whole[source][..., to_indices(self.plan.columns[lane])]
            if not _agree(parts[source], expected):
                return self.rejection(self._first_difference(parts, lane), lane)
        return None

    def rejection(self, node: fx.Node, lane: int = 0) -> Rejection:
        """The rejection of the branch, which cannot be split as shows at `node`."""
        if node is self.output:
            reason = f"lane {lane}'s part of the branch differs from the same part of the whole branch"
            return Rejection(reason, (node.name,), module_path(node), DEGREE_HINT)
        return mixing(self._mixer, self._parts) if self._mixer is not None else _not_by_parts(node)

    def _first_difference(self, parts: dict[fx.Node, Any], lane: int) -> fx.Node:
        """The first node whose value on a lane is not the lane's part of its value on all."""
        for node in self.region:
            part = parts.get(node)
            if not isinstance(part, Tensor) or node.name not in self.plan.kept_sets:
                continue
            if not _agree(part, self._cut(self._whole[node], node.name, lane)):
                return node
        return self.output

    def _cut(self, value: Any, name: str, lane: int) -> Any:
        for dim, lanes in enumerate(self.plan.kept_sets.get(name, ())):
            if lanes is not None and isinstance(value, Tensor):
                value = value.index_select(dim, torch.tensor(to_indices(lanes[lane])))
        return value


def sort_weights(program: Program) -> None:
    """Bring the weight table into graph order and drop rows and placeholders that nothing reads."""
    # What computed the whole of a weight of which only a part is wanted now still reads its operands.
    program.graph.eliminate_dead_code()
    table = {}
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and node.name in program.weights:
            if node.users:
                table[node.name] = program.weights[node.name]
            else:
                program.graph.erase_node(node)
    program.weights = table
