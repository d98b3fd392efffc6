"""A lane program's cached decoding in one process, lane by lane: the reference for what ranks do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kraken_compiler.backends.single.streaming import StreamingProgram, read_from_source
from kraken_compiler.ir.program import Program


class LaneDecoder:
    """Runs the step program of every lane on caches of its own.

    Args:
        program: A lane program with a cache.
        read: The weight store.
        batch, capacity: Sizes of the caches.
        positional: Use the op's positional way even where rows are alike, as a CUDA graph would.
    """

    def __init__(
        self,
        program: Program,
        read: Callable[[str], Tensor],
        batch: int,
        capacity: int,
        *,
        positional: bool = False,
    ) -> None:
        assert program.cached is not None
        self.cached, self.batch, self.capacity, self.positional = program.cached, batch, capacity, positional
        step, tables, plan = program.cached.step, program.cached.tables, program.cached.plan
        self.step = StreamingProgram(step, read_from_source(step, read))
        lanes = range(program.degree)
        ids = torch.zeros(1, capacity, dtype=torch.int64)
        values = StreamingProgram(tables, read_from_source(tables, read)).run_flat([ids])
        self.feeds = dict(zip(plan.tables, values, strict=True))
        for cache in plan.caches:
            for name, dim in ((cache.key, cache.key_dim), (cache.value, cache.value_dim)):
                dtype = getattr(torch, cache.dtype)
                # Not zeros: what was never written must not count.
                store = [torch.full((batch, cache.heads, capacity, dim), 100.0, dtype=dtype) for _ in lanes]
                self.feeds[name] = type_of_lanes(store)

    def run(self, ids: Tensor, positions: Tensor, picks: Tensor | None = None) -> Tensor:
        """Logits [batch, picks, vocabulary] of new tokens at given positions."""
        alike = bool((positions == positions[:1]).all()) and not self.positional
        length = int(positions.max()) + 1
        past = length - ids.shape[1] if alike else 0
        slots = length if alike or past + ids.shape[1] == length and ids.shape[1] > 1 else self.capacity
        picks = torch.arange(ids.shape[1]).expand(ids.shape) if picks is None else picks
        feeds = {
            **self.feeds,
            "positions": positions[:1] if alike else positions,
            "slots": torch.arange(slots),
            "past": torch.arange(past),
            "picks": picks,
        }
        names = [spec.name for spec in self.cached.step.inputs]
        (logits,) = self.step.run_flat([ids, *(feeds[name] for name in names[1:])])
        return logits


def type_of_lanes(values: object) -> Tensor:
    """One value per lane, as the streaming evaluator passes them around."""
    from kraken_compiler.backends.single.streaming import _Lanes

    return _Lanes(values)  # type: ignore[return-value, arg-type]
