"""Say how much each lane's columns count in a mean over split columns.

    %m = kraken.mean_power(%q, 2, 64)                ->     %m = kraken.mean_power(%q, 2, 64, share)    to be reduced
                                                     or     %m = sum(mul(%q, %q)) / 64                  the same on all

Lanes add up what their columns are of the mean; columns of a KV head that several lanes hold count once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.index_set import IndexSet, to_indices
from kraken_compiler.ir.program import Program, Split
from kraken_compiler.ir.weight_table import DimShard
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the op)
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten
from kraken_compiler.passes.graph_tools import replace as replace_node
from kraken_compiler.passes.shapes import shape_of, value_of
from kraken_compiler.passes.shard.split_branches import sort_weights
from kraken_compiler.passes.shard.split_weights import WeightSplitter, original_shapes

MEAN = torch.ops.kraken.mean_power.default


@dataclass(frozen=True)
class ShareMeans(Pass[Split]):
    name: ClassVar[str] = "share-means"
    requires: ClassVar[type[Program]] = Split

    def run(self, program: Split) -> PassResult:
        nodes = {node.name: node for node in program.graph.nodes}
        splitter = WeightSplitter(program, original_shapes(program))
        matches = 0
        branches, shards = {}, []
        for branch, plan in zip(program.layers.branches, program.shards, strict=True):
            replacements: dict[str, list[str]] = {}
            for name in branch.nodes:
                if nodes[name].target is not MEAN or len(nodes[name].args) > 3:
                    continue
                matches += 1
                kept_sets = plan.kept_sets.get(args_of(nodes[name])[0].name)
                if kept_sets and kept_sets[-1] is not None:
                    _weigh(nodes[name], kept_sets[-1], splitter)
                else:
                    replacements[name] = own_mean(nodes[name])
            branches[branch] = tuple(new for name in branch.nodes for new in replacements.get(name, [name]))
            shards.append(
                replace(plan, region=tuple(new for name in plan.region for new in replacements.get(name, [name])))
            )
        program.shards = tuple(shards)
        program.layers = program.layers.with_nodes(branches)
        sort_weights(program)
        return PassResult(matches)


def _weigh(mean: fx.Node, lanes: tuple[IndexSet, ...], splitter: WeightSplitter) -> None:
    """Let columns that several lanes hold (of a replicated KV head) count once."""
    x, power, width = args_of(mean)
    lane_counts = Counter(index for lane in lanes for index in to_indices(lane))
    # As exact as the mean itself: a third in single precision would round a norm of double precision.
    dtype = torch.promote_types(value_of(x).dtype, torch.float32)
    share = torch.tensor([1.0 / max(1, lane_counts[column]) for column in range(width)], dtype=dtype)
    counts = ".".join(str(lane_counts[column]) for column in range(width))
    source = f"kraken.share.{counts}:{str(dtype).removeprefix('torch.')}"
    if len(set(lane_counts.values())) == 1 and len(lane_counts) == width:
        mean.args = (x, power, width * lane_counts[0], None)
    else:
        mean.args = (x, power, width, splitter.add_constant(source, share, (DimShard(0, lanes),)))


def own_mean(mean: fx.Node) -> list[str]:
    """Let a lane take a mean over the columns that it has; returns the names of the nodes that do."""
    x, power = args_of(mean)[:2]
    graph = mean.graph
    with graph.inserting_before(mean):
        new_nodes = [x] if power == 1 else [x, graph.call_function(aten.mul.Tensor, (x, x))]
        new_nodes.append(graph.call_function(aten.sum.dim_IntList, (new_nodes[-1], [-1], True)))
        new_nodes.append(graph.call_function(aten.mul.Tensor, (new_nodes[-1], 1.0 / int(shape_of(x)[-1]))))
    replace_node(mean, new_nodes[-1])
    return [node.name for node in new_nodes[1:]]
