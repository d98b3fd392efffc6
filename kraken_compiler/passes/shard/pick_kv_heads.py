"""Pick every head's KV head by number where lanes have different shares of the heads that read one KV head.

%r = reshape(expand(unsqueeze(%k, 2), [.., 4, ..]), [.., 8, ..])
                                                 ->     %r = index_select(%k, 1, [0, 0, 0, 0, 1, 1, 1, 1])
%y = attention(%q, %r, ...)                             %y = attention(%q, %r, ...)

Repeating is the same on all lanes, the numbers need not be: each lane gets its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program, Recognized
from kraken_compiler.ops.op_sets import ATTENTIONS
from kraken_compiler.passes.cache.unrepeat import unrepeated
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten, calls
from kraken_compiler.passes.recognize.find_layers import find_layers
from kraken_compiler.passes.shapes import compute_shape, fake_mode_of, shape_of
from kraken_compiler.passes.shard.degrees import KV_HEAD_OF, shared_groups
from kraken_compiler.passes.shard.split_branches import sort_weights
from kraken_compiler.passes.shard.split_weights import WeightSplitter


def kv_head_numbers(splitter: WeightSplitter, heads: int, kv_heads: int) -> fx.Node:
    """The numbers of the KV heads that every head reads, as a constant of the graph."""
    return splitter.add_constant(f"{KV_HEAD_OF}.{heads}.{kv_heads}", torch.arange(heads) // (heads // kv_heads))


@dataclass(frozen=True)
class PickKvHeads(Pass[Recognized]):
    """The pass for a split over `degree` lanes."""

    degree: int = 1

    name: ClassVar[str] = "pick-kv-heads"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        if program.degree == self.degree:
            return PassResult()
        splitter = WeightSplitter(program, {})
        units = {name: branch.unit for branch in program.layers.branches for name in branch.nodes}
        matches = sum(self._pick(node, splitter, units.get(node.name, 1)) for node in calls(program.graph, *ATTENTIONS))
        if not matches:
            return PassResult()
        sort_weights(program)
        layers = find_layers(program)
        if isinstance(layers, Rejection):
            return PassResult(matches, (layers,))
        program.layers = layers
        return PassResult(matches)

    def _pick(self, attention: fx.Node, splitter: WeightSplitter, unit: int) -> int:
        heads = int(shape_of(attention)[-3])
        args = list(args_of(attention))
        matches = 0
        for place in (1, 2):
            source = unrepeated(args[place])
            kv_heads = int(shape_of(source)[-3])
            if kv_heads == heads or len(shape_of(source)) != 4:
                continue
            if not shared_groups(heads, kv_heads, self.degree, unit):
                continue
            index = kv_head_numbers(splitter, heads, kv_heads)
            with attention.graph.inserting_before(attention):
                args[place] = attention.graph.call_function(aten.index_select.default, (source, 1, index))
            args[place].meta["nn_module_stack"] = attention.meta.get("nn_module_stack", {})
            compute_shape(args[place], fake_mode_of(attention.graph))
            matches += 1
        if matches:
            attention.args = tuple(args)
            attention.kwargs = {name: value for name, value in attention.kwargs.items() if name != "enable_gqa"}
        return matches
