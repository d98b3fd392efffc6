"""A lane program's cached decoding in one process, lane by lane: the reference for what ranks do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.reference import Lanes, StreamingProgram, read_from_source

GARBAGE = 100.0
"""What unwritten slots hold: it would show if it were ever attended to."""


class LaneDecoder:
    """Runs the step program of every lane on caches of its own.

    Args:
        program: A lane program with a cache.
        read: The weight store.
        batch, capacity: Sizes of the caches.
    """

    def __init__(self, program: LaneProgram, read: SourceReader, batch: int, capacity: int) -> None:
        assert program.cached is not None, program.no_cache
        step, tables, plan = program.cached.step, program.cached.tables, program.cached.plan
        self.batch, self.capacity = batch, capacity
        self._step, self._inputs = StreamingProgram(step, read_from_source(step, read)), step.inputs
        split = program.cached.split
        if split is not None:
            self._halves = StreamingProgram(split.program, read_from_source(split.program, read))
            self._more_inputs = program.cached.split_inputs
        ids = torch.zeros(1, capacity, dtype=torch.int64)
        values = StreamingProgram(tables, read_from_source(tables, read)).run_flat([ids])
        self._feeds: dict[str, Any] = dict(zip(plan.tables, values, strict=True))
        for cache in plan.caches:
            for name, dim in ((cache.key, cache.key_dim), (cache.value, cache.value_dim)):
                shape, dtype = (batch, cache.heads, capacity, dim), getattr(torch, cache.dtype)
                self._feeds[name] = Lanes(torch.full(shape, GARBAGE, dtype=dtype) for _ in range(program.degree))

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        positional: bool = False,
        picks: Tensor | None = None,
        cut: int | None = None,
    ) -> Tensor:
        """Logits of new tokens.

        Args:
            ids: int64 [batch, tokens].
            positions: int64 [batch, tokens], of every token.
            positional: Let the positions say where tokens go, in a cache of which all is looked at, whatever the rows.
            picks: int64 [batch, k], whose logits are wanted; None means all.
            cut: How many of the tokens the first half has; None runs all at once.

        Returns:
            [batch, k, vocabulary].
        """
        tokens, length = ids.shape[1], int(positions.max()) + 1
        alike = bool((positions == positions[:1]).all()) and not positional
        feeds = {
            **self._feeds,
            "positions": positions[:1] if alike else positions,
            "slots": torch.arange(length if alike else self.capacity),
            "past": torch.arange(length - tokens if alike else 0),
            "picks": torch.arange(tokens).expand(ids.shape) if picks is None else picks,
        }
        inputs, program = self._inputs[1:], self._step
        if cut is not None:
            seen, past = (length - tokens + cut,) * 2 if alike else (self.capacity, 0)
            feeds |= {"cut": torch.arange(cut), "first_slots": torch.arange(seen), "second_past": torch.arange(past)}
            inputs, program = (*inputs, *self._more_inputs), self._halves
        (logits,) = program.run_flat([ids, *(feeds[spec.name] for spec in inputs)])
        return logits
