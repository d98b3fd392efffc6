"""Say of which columns a mean over split columns is taken, and how much each lane's columns count.

    %m = kraken.mean_power(%q, 2, 64)                ->     %m = kraken.mean_power(%q, 2, 64, share)    to be reduced
                                                     or     %m = sum(mul(%q, %q)) / 16                  the lane's own

A branch that reads the stream as it is in the source takes the mean over all lanes, so that `standard` is exact. One
that reads its peers late knows nothing new of them here either and takes the mean over what it has: no collective comes
into the window that the form promises.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir import ops  # noqa: F401  (registers the op)
from kraken_compiler.ir.index_set import size, to_indices
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.shards import KeptDim
from kraken_compiler.ir.weight_table import DimShard
from kraken_compiler.passes.base import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten, replace
from kraken_compiler.passes.shard.split_branches import sort_weights
from kraken_compiler.passes.shard.split_weights import WeightSplitter, original_shapes

_MEAN = torch.ops.kraken.mean_power.default


@dataclass(frozen=True)
class ShareMeans(Pass):
    name: ClassVar[str] = "share-means"
    requires: ClassVar[tuple[str, ...]] = ("layers", "plan", "shards")

    def run(self, program: Program) -> PassResult:
        assert program.layers is not None
        assert program.plan is not None
        nodes = {node.name: node for node in program.graph.nodes}
        splitter = WeightSplitter(program, original_shapes(program))
        matches = 0
        branches = {}
        for branch, read, plan in zip(program.layers.branches, program.plan.reads, program.shards, strict=True):
            is_fresh = read.own == read.peers == branch.reads
            names: list[str] = []
            for name in branch.nodes:
                if nodes[name].target is not _MEAN or len(nodes[name].args) > 3:
                    names.append(name)
                    continue
                matches += 1
                kept = plan.kept.get(args_of(nodes[name])[0].name)
                lanes = kept[-1] if kept else None
                if lanes is not None and is_fresh:
                    _weigh(nodes[name], lanes, splitter)
                    names.append(name)
                else:
                    names += _own_mean(nodes[name], lanes)
            branches[branch] = tuple(names)
        program.layers = program.layers.with_nodes(branches)
        sort_weights(program)
        return PassResult(matches)


def _weigh(mean: fx.Node, lanes: KeptDim, splitter: WeightSplitter) -> None:
    """Let columns that several lanes hold (of a replicated KV head) count once."""
    assert lanes is not None
    x, power, width = args_of(mean)
    held = Counter(index for lane in lanes for index in to_indices(lane))
    share = torch.tensor([1.0 / max(1, held[column]) for column in range(width)])
    source = f"kraken.share.{'.'.join(str(held[column]) for column in range(width))}"
    if len(set(held.values())) == 1 and len(held) == width:
        mean.args = (x, power, width * held[0], None)
    else:
        mean.args = (x, power, width, splitter.add_constant(source, share, (DimShard(0, lanes),)))


def _own_mean(mean: fx.Node, lanes: KeptDim) -> list[str]:
    x, power, width = args_of(mean)
    graph, columns = mean.graph, width if lanes is None else size(lanes[0])
    with graph.inserting_before(mean):
        made = [x] if power == 1 else [x, graph.call_function(aten.mul.Tensor, (x, x))]
        made.append(graph.call_function(aten.sum.dim_IntList, (made[-1], [-1], True)))
        made.append(graph.call_function(aten.mul.Tensor, (made[-1], 1.0 / columns)))
    replace(mean, made[-1])
    return [node.name for node in made[1:]]
