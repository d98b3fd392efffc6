"""Split embeddings by rows, as the head is split: a lane looks up its own rows, and one sum gives all lanes all rows.

%x = embedding(%w, %ids)        [b, s, 64]       ->     %p = kraken.lane_embedding(%w_lane, %ids, %first, 97)
                                                        %x = kraken.wait(kraken.all_reduce_start(%p))

Of the lanes' parts all but one are zeros, so the sum is exact. A head that is the same tensor reads the same rows of
it: a lane holds them once. Whatever reads a table otherwise keeps it whole, for all that read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.index_set import IndexSet
from kraken_compiler.ir.program import Program, Recognized
from kraken_compiler.ir.schedule import AUTO
from kraken_compiler.ir.shards import WHOLE
from kraken_compiler.ir.weight_table import DimShard, WeightSpec
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import EMBEDDING, LANE_EMBEDDING
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, calls, near_miss
from kraken_compiler.passes.sample_inputs import index_of
from kraken_compiler.passes.shard.split_branches import sort_weights
from kraken_compiler.passes.shard.split_weights import WeightSplitter, original_shapes
from kraken_compiler.passes.shard.vocabulary_blocks import SMALLEST_BLOCK, vocabulary_blocks

_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default


@dataclass(frozen=True)
class SplitEmbedding(Pass[Recognized]):
    """Split the tables that are looked up by an input, such as token ids, over the program's lanes.

    Attributes:
        choice: `split` splits every table that can be split, `whole` none, `auto` those that are worth a sum.
        smallest: Rows per lane below which a table stays whole.
        least_share: With `auto`, the share of a lane's memory that a split must save.
    """

    choice: str = AUTO
    smallest: int = SMALLEST_BLOCK
    least_share: float = 0.01

    name: ClassVar[str] = "split-embedding"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        if program.degree == 1 or self.choice == WHOLE:
            return PassResult()
        inputs = {spec.name for spec in program.inputs}
        lookups: dict[fx.Node, list[fx.Node]] = {}
        for node in calls(program.graph, EMBEDDING):
            if index_of(node) in inputs:
                lookups.setdefault(args_of(node)[0], []).append(node)
        splitter = WeightSplitter(program, original_shapes(program))
        result = PassResult.of(self._split(table, nodes, splitter) for table, nodes in lookups.items())
        sort_weights(program)
        return result

    def _split(self, table: fx.Node, lookups: list[fx.Node], splitter: WeightSplitter) -> bool | Rejection:
        """Split one table; False if it is too small to be worth it."""
        program = splitter.program
        spec = program.weights.get(table.name)
        if spec is None or not spec.torch_dtype.is_floating_point:
            return near_miss("its rows are computed from other tensors, or are whole numbers", table)
        other = next((user for user in table.users if user not in lookups), None)
        if other is not None:
            return near_miss(f"'{other.name}' reads all of the table", table)
        lookup = next((node for node in lookups if _scales_gradients(node)), None)
        if lookup is not None:
            return near_miss("its gradients depend on how often a row is looked up", lookup)
        blocks = vocabulary_blocks(spec.source_shape[0], program.degree, self.smallest)
        if blocks is None or (self.choice == AUTO and _saved_share(spec, program) < self.least_share):
            return False
        part = splitter.part(table, (blocks, None))
        first_row = _first_row(spec.source_shape[0], blocks, splitter)
        for lookup in lookups:
            _look_up(lookup, part, first_row, spec.source_shape[0])
        return True


def _scales_gradients(lookup: fx.Node) -> bool:
    return bool(argument(lookup, 3, "scale_grad_by_freq", False) or argument(lookup, 4, "sparse", False))


def _saved_share(table: WeightSpec, program: Program) -> float:
    """Bytes of a table that a lane need not hold if it is split, as a share of a lane's part of the whole model."""
    sources = {spec.source: _source_bytes(spec) for spec in program.weights.values() if spec.kind == "parameter"}
    whole = sum(sources.values()) or 1
    return _source_bytes(table) * (1 - 1 / program.degree) / (whole / program.degree)


def _source_bytes(spec: WeightSpec) -> int:
    return math.prod(spec.source_shape) * spec.torch_dtype.itemsize


def _first_row(rows: int, blocks: tuple[IndexSet, ...], splitter: WeightSplitter) -> fx.Node:
    """The number of a lane's first row, [1]."""
    numbers = torch.tensor([block[0][0] for block in blocks])
    lanes = tuple(((lane, lane + 1),) for lane in range(len(blocks)))
    return splitter.add_constant(f"kraken.first_rows.{rows}", numbers, (DimShard(0, lanes),))


def _look_up(lookup: fx.Node, part: fx.Node, first_row: fx.Node, rows: int) -> None:
    """Let a lookup await the sum of the lanes' parts. It stays the node that the layer table names."""
    ids, padding_idx = args_of(lookup)[1], argument(lookup, 2, "padding_idx", -1)
    graph = lookup.graph
    with graph.inserting_before(lookup):
        found = graph.call_function(LANE_EMBEDDING, (part, ids, first_row, rows, padding_idx))
        start = graph.call_function(_START, (found,))
    for node in (found, start):
        node.meta = dict(lookup.meta)
    lookup.target, lookup.args, lookup.kwargs = _WAIT, (start,), {}
