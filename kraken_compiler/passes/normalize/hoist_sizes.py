"""Read every dynamic size from an input, once, at the top of the graph.

    %n = sym_size(%scores, 0)                        ->     %n = sym_size(%input_ids, 0)

Then no size depends on a tensor that is split or batched over lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten, calls
from kraken_compiler.passes.shapes import shape_of


@dataclass(frozen=True)
class HoistSizes(Pass[Program]):
    name: ClassVar[str] = "hoist-sizes"

    def run(self, program: Program) -> PassResult:
        sources = _size_sources(program)
        size_nodes: dict[Any, fx.Node] = {}
        matches = 0
        last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
        for node in calls(program.graph, aten.sym_size.int):
            size = node.meta["val"]
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression not in sources:
                continue
            if expression not in size_nodes:
                if args_of(node) == sources[expression]:
                    last.append(node)
                    last = size_nodes[expression] = node
                    continue
                with program.graph.inserting_after(last):
                    last = size_nodes[expression] = program.graph.call_function(aten.sym_size.int, sources[expression])
                last.meta["val"] = size
            node.replace_all_uses_with(size_nodes[expression])
            program.graph.erase_node(node)
            matches += 1
        return PassResult(matches)


def _size_sources(program: Program) -> dict[Any, tuple[fx.Node, int]]:
    """The first input and dim that has each symbolic size."""
    names = {spec.name for spec in program.inputs}
    sources: dict[Any, tuple[fx.Node, int]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            for dim, size in enumerate(shape_of(node)):
                if isinstance(size, torch.SymInt):
                    sources.setdefault(size.node.expr, (node, dim))
    return sources
