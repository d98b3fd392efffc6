"""Start every reduce right after its operand, await it right before its first use, and record what lies between.

%h = kraken.all_reduce_start(%u)
...                                  <- the window: compute that hides the reduce
%y = kraken.wait(%h)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.schedule import Window
from kraken_compiler.passes.base import Pass, PassResult
from kraken_compiler.passes.graph_tools import ATTENTION, GEMMS, args_of

_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default


@dataclass(frozen=True)
class PlaceCollectives(Pass):
    name: ClassVar[str] = "place-collectives"
    requires: ClassVar[tuple[str, ...]] = ("plan",)
    ensures: ClassVar[tuple[str, ...]] = ("windows",)

    def run(self, program: Program) -> PassResult:
        assert program.plan is not None
        place = {node: number for number, node in enumerate(program.graph.nodes)}
        moved = 0
        for node in list(program.graph.nodes):
            if node.target is _START:
                operand = args_of(node)[0]
                moved += operand.next is not node
                operand.append(node)
            elif node.target is _WAIT:
                first = min(node.users, key=place.__getitem__)
                moved += node.next is not first
                first.prepend(node)
        program.windows = find_windows(program)
        faults = [
            Rejection(
                f"reduce {window.reduce} should be hidden behind branches {list(window.promised)}, "
                f"but no matrix product lies between its start and its wait",
                (window.start, window.wait),
            )
            for window in program.windows
            if window.promised and not window.gemms
        ]
        return PassResult(moved, tuple(faults))


def find_windows(program: Program) -> tuple[Window, ...]:
    """For every reduce of the program, the matrix products and attentions between its start and its wait."""
    assert program.plan is not None
    order = list(program.graph.nodes)
    starts = [node for node in order if node.target is _START]
    windows = []
    for reduce, start in zip(program.plan.reduces, starts, strict=True):
        (wait,) = start.users
        between = order[order.index(start) + 1 : order.index(wait)]
        gemms = tuple(node.name for node in between if is_gemm(node))
        windows.append(Window(reduce.index, start.name, wait.name, gemms, reduce.window))
    return tuple(windows)


def is_gemm(node: fx.Node) -> bool:
    """True for the operations long enough to hide a collective behind."""
    return node.target in GEMMS or node.target is ATTENTION
