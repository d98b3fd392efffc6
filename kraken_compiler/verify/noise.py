"""The rounding noise that a program has of its own: how far its results go when every operator rounds otherwise.

Monte Carlo arithmetic with one sample (Parker, "Monte Carlo Arithmetic", UCLA CSD-970002, 1997): what an operator gives
is off by one bit of its element type, up or down at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.reference import Lanes, ReadLane, StreamingProgram
from kraken_compiler.verify.compare import largest_errors
from kraken_compiler.verify.tolerances import computed_nodes


def measure_noise(program: Program, read_lane: ReadLane, inputs: Sequence[Tensor]) -> float:
    """Run a program twice, the second time with other rounding; returns the relative difference of its outputs.

    Args:
        program: The program.
        read_lane: Gives its weights.
        inputs: Its inputs.
    """
    return largest_errors(*(run(program, read_lane).run_flat(inputs) for run in (_Rounded, StreamingProgram)))[1]


class _Rounded(StreamingProgram):
    """Puts everything that depends on the inputs off by one bit."""

    def __init__(self, program: Program, read_lane: ReadLane) -> None:
        super().__init__(program, read_lane)
        self._nodes = computed_nodes(program)
        self._generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self._rounded(value) if n.op == "call_function" and n in self._nodes else value

    def _rounded(self, value: Any) -> Any:
        if isinstance(value, (Lanes, tuple, list)):
            return type(value)(map(self._rounded, value))
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        signs = torch.randint(2, value.shape, generator=self._generator).to(value.device) * 2 - 1
        return value * (1 + signs * torch.finfo(value.dtype).eps).to(value.dtype)
