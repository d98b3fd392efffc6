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
        homes = _homes(program)
        hoisted: dict[Any, fx.Node] = {}
        matches = 0
        last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
        for node in calls(program.graph, aten.sym_size.int):
            size = node.meta["val"]
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression not in homes:
                continue
            if expression not in hoisted:
                if args_of(node) == homes[expression]:
                    last.append(node)
                    last = hoisted[expression] = node
                    continue
                with program.graph.inserting_after(last):
                    last = hoisted[expression] = program.graph.call_function(aten.sym_size.int, homes[expression])
                last.meta["val"] = size
            node.replace_all_uses_with(hoisted[expression])
            program.graph.erase_node(node)
            matches += 1
        return PassResult(matches)


def _homes(program: Program) -> dict[Any, tuple[fx.Node, int]]:
    """For every symbolic size, the first input and dim that has it."""
    names = {spec.name for spec in program.inputs}
    homes: dict[Any, tuple[fx.Node, int]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            for dim, size in enumerate(shape_of(node)):
                if isinstance(size, torch.SymInt):
                    homes.setdefault(size.node.expr, (node, dim))
    return homes
