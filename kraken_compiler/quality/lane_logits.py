"""A lane program as a language model, run in little memory: what measurements of quality compare."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kraken_compiler.backends.single.streaming import ReadLane, StreamingProgram
from kraken_compiler.ir.program import Program
from kraken_compiler.quality.evaluate import LogitsOf
from kraken_compiler.runtime.logits import logits_function


def lane_logits(program: Program, read_lane: ReadLane) -> LogitsOf:
    """Token ids [batch, sequence] -> logits, computed node by node with each weight read when it is needed."""
    return logits_function(program.inputs, program.call, StreamingProgram(program, read_lane).run_flat)


def replay(logits: Sequence[Tensor]) -> LogitsOf:
    """A model that says again what it said to the same batches in the same order."""
    following = iter(logits)
    return lambda ids: next(following)
