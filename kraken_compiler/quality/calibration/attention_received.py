"""Attention that every position of a row receives: what all the rest of a text reads must not be wrong.

Trained Transformers let most heads of most layers rest on one token, the first as a rule (an attention sink: Xiao et
al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024), and give that token a residual stream like
no other's. It is one of hundreds, so a regression that takes all tokens for equal ignores it, and every later token
then reads a sink that is none. Weighing tokens by how much they are read puts that right at no cost to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.reference import ReadLane, StreamingProgram
from kraken_compiler.ops.op_sets import ATTENTIONS


def attention_received(program: Program, read_lane: ReadLane, inputs: Sequence[Tensor]) -> Tensor:
    """The attention that the tokens of a row receive from the whole row, by position.

    Args:
        program: The source as a lane program in `standard` form.
        read_lane: Its weights.
        inputs: The program's flat inputs, a batch of rows of one length.

    Returns:
        float32 [sequence]: summed over queries, mean over rows, heads and layers; so its mean is 1. Ones where the
        program has no self-attention over rows of this length.
    """
    sums = _AttentionSums(program, read_lane, inputs[0].shape[-1])
    sums.run_flat(inputs)
    return sums.received_S / sums.count if sums.count else torch.ones(inputs[0].shape[-1])


class _AttentionSums(StreamingProgram):
    """Runs a program and sums its attention probabilities."""

    def __init__(self, program: Program, read_lane: ReadLane, sequence: int) -> None:
        super().__init__(program, read_lane)
        self.received_S, self.count = torch.zeros(sequence), 0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in ATTENTIONS:
            for lane in range(self.program.degree if self._differs((args, kwargs)) else 1):
                lane_args, lane_kwargs = self._on_lane((args, kwargs), lane)
                self._add(target, *lane_args, **lane_kwargs)
        return super().call_function(target, args, kwargs)

    def _add(self, target: Any, query: Tensor, key: Tensor, _: Tensor, *rest: Any, **options: Any) -> None:
        tokens = key.shape[-2]
        if query.shape[-2] == tokens == len(self.received_S):
            # Attention over unit vectors gives its probabilities, whatever its mask and scale.
            units = torch.eye(tokens, dtype=key.dtype).expand(*key.shape[:-1], tokens)
            attention = target(query, key, units, *rest, **options).float().nan_to_num().sum(-2)
            self.received_S += attention.reshape(-1, tokens).mean(0)
            self.count += 1
