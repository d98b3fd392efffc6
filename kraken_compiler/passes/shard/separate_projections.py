"""Give queries, keys and values projections of their own where one holds them group by group and lanes cut groups.

%y = linear(%x, %w)                                    %yq = linear(%x, rows of %w that are queries)
%v = reshape(%y, [b, s, 2, 6, 8])                ->    %q = reshape(%yq, [b, s, 8, 8])
%q = reshape(slice(%v, 3, 0, -2), [b, s, 8, 8])        %yk = linear(%x, rows of %w that are keys)
%k = select(%v, 3, [-2])                               %k = reshape(%yk, [b, s, 2, 1, 8])

Where keys or values are repeated for their queries' heads right behind it, every head picks its KV head by number.
A lane's heads are then equally many rows on every lane, wherever a group ends. Only layout operators may lie between;
what they do is found out by sending the numbers of the rows through them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import from_indices
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Program, Recognized
from kraken_compiler.ir.weight_table import DimShard
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.graph_tools import replace as replace_node
from kraken_compiler.passes.probing import Region
from kraken_compiler.passes.recognize.find_layers import find_layers
from kraken_compiler.passes.recognize.projections import known_constants
from kraken_compiler.passes.shapes import is_tensor, refresh_shapes, shape_of
from kraken_compiler.passes.shard.degrees import shared_groups, spread
from kraken_compiler.passes.shard.pick_kv_heads import kv_head_numbers
from kraken_compiler.passes.shard.split_branches import sort_weights
from kraken_compiler.passes.shard.split_weights import WeightSplitter

_LAYOUT = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.index.Tensor,
        aten.index_select.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        operator.getitem,
    }
)


@dataclass(frozen=True)
class SeparateProjections(Pass[Recognized]):
    """The pass for a split over `degree` lanes; nothing changes where no lane cuts a group."""

    degree: int = 1

    name: ClassVar[str] = "separate-projections"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        if program.degree == self.degree:
            return PassResult()
        uneven_branches = [
            branch
            for branch in program.layers.branches
            if branch.kind == "attention" and _is_uneven(branch, self.degree)
        ]
        if not uneven_branches:
            return PassResult()
        splitter = WeightSplitter(program, {})
        constants = known_constants(program)
        nodes = {node.name: node for node in program.graph.nodes}
        matches = 0
        for branch in uneven_branches:
            for name in branch.nodes:
                node = nodes[name]
                if node.target is LINEAR and args_of(node)[1].name in program.weights:
                    matches += self._separate(node, branch, splitter, constants)
        if not matches:
            return PassResult()
        refresh_shapes(program.graph)
        sort_weights(program)
        layers = find_layers(program)
        if isinstance(layers, Rejection):
            return PassResult(matches, (layers,))
        program.layers = layers
        return PassResult(matches)

    def _separate(
        self, linear: fx.Node, branch: Branch, splitter: WeightSplitter, constants: Mapping[str, Tensor]
    ) -> bool:
        view = next(iter(linear.users))
        if len(linear.users) != 1 or view.target is not aten.reshape.default or _is_by_head(view, branch):
            return False
        sizes, parts = argument(view, 1, "shape")[:2], _parts(linear, branch)
        rows = _rows(linear, parts, constants) if parts else None
        if rows is None or any(isinstance(size, int) for size in sizes):
            return False
        x, weight, bias = args_of(linear)[0], args_of(linear)[1], argument(linear, 2, "bias")
        for part, part_rows in zip(parts, rows):
            shard = DimShard(0, (from_indices(part_rows),) * self.degree)
            operands = [
                splitter.add_weight(replace(splitter.program.weights[whole.name], shards=(shard,)), near=whole)
                for whole in (weight, bias)
                if whole is not None
            ]
            repetition = _repetition(part, branch.heads)
            shape = [*sizes, *(size for size in shape_of(part)[2:] if repetition is None or size != 1)]
            with linear.graph.inserting_before(linear):
                projection = linear.graph.call_function(LINEAR, (x, *operands))
                heads = linear.graph.call_function(aten.reshape.default, (projection, shape))
                if repetition is not None:
                    index = kv_head_numbers(splitter, branch.heads, branch.kv_heads)
                    heads = linear.graph.call_function(aten.index_select.default, (heads, 2, index))
            for new in (projection, heads):
                new.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
            replace_node(repetition or part, heads)
        return True


def _repetition(part: fx.Node, heads: int) -> fx.Node | None:
    """The node that repeats a part's KV heads before anything else happens to them: [B, S, heads, D]."""
    users = list(part.users)
    if len(users) != 1 or users[0].target is not aten.expand.default or len(users[0].users) != 1:
        return None
    whole = next(iter(users[0].users))
    same = whole.target is aten.reshape.default and shape_of(whole)[2:] == (heads, shape_of(part)[-1])
    # Repeated head by head: the dim that grows lies behind that of the KV heads.
    return whole if same and shape_of(part)[2:-1][1:] == (1,) else None


def _is_uneven(branch: Branch, degree: int) -> bool:
    if any(share.owned != share.stop for share in spread(branch.heads, degree, branch.unit)):
        return True
    return shared_groups(branch.heads, branch.kv_heads or branch.heads, degree, branch.unit)


def _is_by_head(view: fx.Node, branch: Branch) -> bool:
    """True if every head has a place of its own in a projection's output: lanes cut between heads then."""
    sizes = _between(view)
    return sizes[:1] == (branch.heads,) or (branch.heads in sizes and branch.kv_heads == branch.heads)


def _between(node: fx.Node) -> tuple[Any, ...]:
    """The sizes between batch and sequence and the last dim."""
    return shape_of(node)[2:-1]


def _parts(linear: fx.Node, branch: Branch) -> list[fx.Node]:
    """The nodes where the heads of queries, keys and values lie in one dim each; empty if that is not everywhere."""
    parts: list[fx.Node] = []
    todo = [linear]
    while todo:
        node = todo.pop()
        # Only where tokens are tokens still: first comes the batch, then the sequence.
        if node is not linear and is_tensor(node) and len(shape_of(node)) >= 4:
            heads = [size for size in _between(node) if size != 1]
            if len(heads) <= 1 and (heads or [1])[0] in (branch.heads, branch.kv_heads):
                parts.append(node)
                continue
        if not all(user.target in _LAYOUT for user in node.users):
            return []
        todo += node.users
    return sorted(parts) if len(parts) > 1 else []


def _rows(linear: fx.Node, parts: list[fx.Node], constants: Mapping[str, Tensor]) -> list[list[int]] | None:
    """The rows of the projection's weight that every part is made of, in order; None if they are in no order."""
    region = Region([linear, *sorted(_inner(linear, parts))], [linear], constants)
    batch, sequence, width = region.inputs[linear].shape
    numbers = torch.arange(width, dtype=torch.float64)
    tokens = torch.arange(batch * sequence, dtype=torch.float64).reshape(batch, sequence, 1)
    rows, places = (region.run({linear: tensor.expand(batch, sequence, width)}) for tensor in (numbers, tokens))
    rows_of_parts = []
    for part in parts:
        token_places: Tensor = places[part]
        if token_places.shape[:2] != (batch, sequence) or not torch.equal(
            token_places.flatten(2), tokens.expand(token_places.flatten(2).shape)
        ):
            return None
        part_rows = rows[part][0, 0].flatten().long().tolist()
        if sorted(set(part_rows)) != part_rows:
            return None
        rows_of_parts.append(part_rows)
    return rows_of_parts


def _inner(linear: fx.Node, parts: list[fx.Node]) -> set[fx.Node]:
    """The nodes behind a projection up to its parts, these included."""
    inner: set[fx.Node] = set()
    todo = list(parts)
    while todo:
        node = todo.pop()
        if node is not linear and node not in inner:
            inner.add(node)
            todo += [operand for operand in node.all_input_nodes if operand.target in _LAYOUT]
    return inner
