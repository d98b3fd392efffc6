"""Split the vocabulary projection by rows; an all-gather puts the logits together.

%l = linear(%n, %w)     [b, s, 97]               ->     %p = linear(%n, %w_lane)            [b, s, 25]
                                                        %g = kraken.all_gather(%p, -1, 4)   [b, s, 100]
                                                        %l = slice(%g, -1, 0, 97)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.index_set import size
from kraken_compiler.ir.program import Program, Recognized
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten
from kraken_compiler.passes.graph_tools import replace as replace_node
from kraken_compiler.passes.shapes import shape_of
from kraken_compiler.passes.shard.split_branches import sort_weights
from kraken_compiler.passes.shard.split_weights import WeightSplitter, original_shapes
from kraken_compiler.passes.shard.vocabulary_blocks import SMALLEST_BLOCK, vocabulary_blocks


@dataclass(frozen=True)
class SplitHead(Pass[Recognized]):
    """Split the head over the program's lanes.

    Attributes:
        smallest: Rows per lane below which a head stays whole; gathering it would cost more than it saves.
    """

    smallest: int = SMALLEST_BLOCK

    name: ClassVar[str] = "split-head"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        head = next((node for node in program.graph.nodes if node.name == program.layers.head), None)
        degree = program.degree
        if head is None or degree == 1 or any(user.target is _ALL_GATHER for user in head.users):
            return PassResult()
        rows = int(shape_of(head)[-1])
        lanes = vocabulary_blocks(rows, degree, self.smallest)
        if lanes is None:
            return PassResult()
        splitter = WeightSplitter(program, original_shapes(program))
        weight, bias = args_of(head)[1], argument(head, 2, "bias")
        assert isinstance(weight, fx.Node)
        parts = [args_of(head)[0], splitter.part(weight, (lanes, None))]
        if bias is not None:
            parts.append(splitter.part(bias, (lanes,)))
        graph = program.graph
        with graph.inserting_before(head):
            local = graph.call_function(LINEAR, tuple(parts))
            whole = graph.call_function(_ALL_GATHER, (local, len(shape_of(head)) - 1, degree))
            if size(lanes[0]) * degree > rows:
                whole = graph.call_function(aten.slice.Tensor, (whole, len(shape_of(head)) - 1, 0, rows))
        local.meta["nn_module_stack"] = head.meta.get("nn_module_stack", {})
        replace_node(head, whole)
        program.layers = replace(program.layers, head=local.name)
        sort_weights(program)
        return PassResult(1)


_ALL_GATHER = torch.ops.kraken.all_gather.default
