"""Comparison of the outputs of real ranks with those of all lanes in one process, whoever ran the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_compiler.backends.base import Reference
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.lanes.reference import StreamingProgram
from kraken_compiler.verify.compare import Comparison, errors, worst_comparison
from kraken_compiler.verify.execute import Array, Execution
from kraken_compiler.verify.noise import measure_noise
from kraken_compiler.verify.prefixes import prefix_lengths, recomputed
from kraken_compiler.verify.replay import split_lengths
from kraken_compiler.verify.tolerances import computed_dtypes, rank_tolerance


def compare_with_lanes(
    execution: Execution,
    lanes: Reference,
    inputs: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[tuple[int, int]],
    windows: Sequence[Window],
    *,
    who: str,
) -> list[Comparison]:
    """Compare outputs and, where ranks give them, the finished sums; with a KV cache the replayed logits too.

    Those are compared with runs without a cache on every prefix, and come from caches with room for more tokens.

    Args:
        execution: What the ranks computed.
        lanes: What they must compute.
        inputs: The input sets that the ranks were given.
        sizes: Batch and sequence size of every set.
        windows: The schedule of the ranks' programs.
        who: What the ranks are called, e.g. "ranks".

    Raises:
        VerificationError: The ranks have more or fewer sums than the lanes.
    """
    program = lanes.program
    streaming = StreamingProgram(program, lanes.read_lane)
    # A single rank keeps no reduces, the lane program of one lane does.
    waits = [window.wait for window in windows] if any(any(sets) for sets in execution.sums) else []
    taps = [window.wait for window in measure_windows(program.graph)] if waits else []
    if len(taps) != len(waits):
        raise VerificationError(f"the {who} have {len(waits)} reduces, the lane program {len(taps)}")
    comparisons = []
    for number, size in enumerate(sizes):
        flat = list(inputs[number].values())
        outputs, sums = streaming.run_with_taps(flat, taps)
        rows = None
        if any(results[number] for results in execution.replays):
            rows = _prefix_logits(streaming, flat[0], outputs[program.call.logits], program.call.logits)
        expected = _Expected(program, outputs, [(name, sums[tap]) for name, tap in zip(waits, taps)], rows)
        of_set = expected.compare(execution, number, size, who)
        if not all(comparison.passed for comparison in of_set):
            noise = measure_noise(program, lanes.read_lane, flat)
            of_set = expected.compare(execution, number, size, who, noise)
        comparisons += of_set
    return comparisons


@dataclass(frozen=True)
class _Expected:
    """What ranks must compute of one input set.

    Attributes:
        program: The lane program.
        outputs: Its outputs.
        sums: Its finished sums by the names of the ranks' waits.
        rows: The logits of a replay; None without a KV cache.
    """

    program: LaneProgram
    outputs: tuple[Tensor, ...]
    sums: Sequence[tuple[str, Tensor]]
    rows: Tensor | None

    def compare(
        self, execution: Execution, number: int, size: tuple[int, int], who: str, noise: float | None = None
    ) -> list[Comparison]:
        """Compare with what the ranks computed of input set `number`, with more tolerance for noise if it is given."""
        logits = self.outputs[self.program.call.logits]
        tolerance = rank_tolerance({logits.dtype} | computed_dtypes(self.program), noise or 0.0)
        have = [_tensors(results[number]) for results in execution.outputs]
        # With a KV cache some programs give the logits only.
        want = self.outputs if len(have[0]) == len(self.outputs) else (logits,)
        where = _first_diverging(self.sums, [sets[number] for sets in execution.sums], tolerance)
        what = f"{self.program.degree} {who} against the lanes in one process"
        comparisons = [worst_comparison(what, size, have, want, tolerance, noise, where)]
        for cut in execution.rows[0][number]:
            what = f"{self.program.degree} {who} that ran rows as two halves, cut behind {cut}, against the lanes"
            halves = [_tensors(results[number][cut]) for results in execution.rows]
            comparisons.append(worst_comparison(what, size, halves, want, tolerance, noise))
        if self.rows is not None:
            what = f"{self.program.degree} {who} with a KV cache against the lanes without"
            replays = [_tensors(results[number].values()) for results in execution.replays]
            comparisons.append(worst_comparison(what, size, replays, (self.rows,) * len(replays[0]), tolerance, noise))
            halves = [_tensors(results[number].values()) for results in execution.halves]
            if any(halves):
                what = f"{self.program.degree} {who} that read tokens as two halves against the lanes"
                ends = self.rows[:, [0, -1]]
                comparisons.append(worst_comparison(what, size, halves, (ends,) * len(halves[0]), tolerance, noise))
        return comparisons


def _prefix_logits(lanes: StreamingProgram, ids: Tensor, logits: Tensor, output: int) -> Tensor:
    """Compute the logits that a replay must give: those of every prefix, run on its own.

    A run on all tokens would not show what depends on how many there are.

    Args:
        lanes: The program without a cache.
        ids: Tokens [batch, tokens].
        logits: Its logits of all of them.
        output: Which of its outputs that is.
    """
    lengths, steps = split_lengths(*ids.shape)
    prefixes = [length for length in prefix_lengths(lengths, steps) if length < ids.shape[1]]
    results = lanes.run_each([[ids[:, :length]] for length in prefixes])
    by_length = {length: outputs[output] for length, outputs in zip(prefixes, results, strict=True)}
    return recomputed({**by_length, ids.shape[1]: logits}, lengths, steps)


def _tensors(arrays: Iterable[Array]) -> tuple[Tensor, ...]:
    return tuple(map(torch.from_numpy, arrays))


def _first_diverging(
    references: Sequence[tuple[str, Tensor]], ranks: Sequence[Mapping[str, Array]], tolerance: float
) -> str:
    """The first sum, in the order of their starts, that a rank got wrong."""
    for name, want in references:
        for rank, sums in enumerate(ranks):
            if not errors(torch.from_numpy(sums[name]), want)[1] <= tolerance:
                return f"the sum that {name} awaits, on rank {rank}"
    return ""
