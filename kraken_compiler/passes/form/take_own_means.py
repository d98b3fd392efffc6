"""Let branches that read their peers late take means over split columns of their own columns alone.

    %m = kraken.mean_power(%q, 2, 64, share)         ->     %m = sum(mul(%q, %q)) / 16                  the lane's own

A branch that reads the stream as it is in the source takes the mean over all lanes, so that `standard` is exact. One
that reads its peers late knows nothing new of them here either and takes the mean over what it has: no collective comes
into the window that the form promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kraken_compiler.ir.program import Planned, Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.shard.share_means import MEAN, own_mean
from kraken_compiler.passes.shard.split_branches import sort_weights


@dataclass(frozen=True)
class TakeOwnMeans(Pass[Planned]):
    name: ClassVar[str] = "take-own-means"
    requires: ClassVar[type[Program]] = Planned

    def run(self, program: Planned) -> PassResult:
        nodes = {node.name: node for node in program.graph.nodes}
        matches = 0
        branches = {}
        for branch, read in zip(program.layers.branches, program.plan.reads, strict=True):
            means = {name for name in branch.nodes if nodes[name].target is MEAN}
            if not means or read.own == read.peers == branch.reads:
                continue
            matches += len(means)
            replacements = {name: own_mean(nodes[name]) for name in branch.nodes if name in means}
            branches[branch] = tuple(new for name in branch.nodes for new in replacements.get(name, [name]))
        program.layers = program.layers.with_nodes(branches)
        sort_weights(program)
        return PassResult(matches)
