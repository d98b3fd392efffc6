"""Start every reduce right after its operand, await it right before its first use, and record what lies between.

%h = kraken.all_reduce_start(%u)
...                                  <- the window: compute that hides the reduce
%y = kraken.wait(%h)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import LaneProgram, Planned, Program
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of

_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default


@dataclass(frozen=True)
class PlaceCollectives(Pass[Planned]):
    name: ClassVar[str] = "place-collectives"
    requires: ClassVar[type[Program]] = Planned

    def run(self, program: Planned) -> PassResult:
        place = {node: number for number, node in enumerate(program.graph.nodes)}
        moves = 0
        for node in list(program.graph.nodes):
            if node.target is _START:
                operand = args_of(node)[0]
                moves += operand.next is not node
                operand.append(node)
            elif node.target is _WAIT:
                first = min(node.users, key=place.__getitem__)
                moves += node.next is not first
                first.prepend(node)
        windows = measure_windows(program.graph, program.plan)
        faults = [
            Rejection(
                f"reduce {window.reduce} should be hidden behind branches {list(window.promised)}, "
                f"but no matrix product lies between its start and its wait",
                (window.start, window.wait),
            )
            for window in windows
            if window.promised and not window.gemms
        ]
        return PassResult(moves, tuple(faults), program.at(LaneProgram, windows=windows))
