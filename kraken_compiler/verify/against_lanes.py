"""Comparison of the outputs of real ranks with those of all lanes in one process, whoever ran the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kraken_compiler.backends.base import Reference
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.lanes.reference import StreamingProgram
from kraken_compiler.verify.compare import Comparison, errors, largest_errors, worst_comparison
from kraken_compiler.verify.execute import Array, Execution
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
    streaming, reordered_streaming = (
        StreamingProgram(program, lanes.read_lane, reverse_sums=reverse) for reverse in (False, True)
    )
    # A single rank keeps no reduces, the lane program of one lane does.
    waits = [window.wait for window in windows] if any(any(sets) for sets in execution.sums) else []
    taps = [window.wait for window in measure_windows(program.graph)] if waits else []
    if len(taps) != len(waits):
        raise VerificationError(f"the {who} have {len(waits)} reduces, the lane program {len(taps)}")
    inside = computed_dtypes(program)
    comparisons = []
    for number, size in enumerate(sizes):
        flat = list(inputs[number].values())
        want, sums = streaming.run_with_taps(flat, taps)
        _, noise = largest_errors(reordered_streaming.run_flat(flat), want)
        logits = want[program.call.logits]
        tolerance = rank_tolerance({logits.dtype} | inside, noise)
        have = [_tensors(results[number]) for results in execution.outputs]
        # With a KV cache some programs give the logits only.
        whole = want if len(have[0]) == len(want) else (logits,)
        pairs = [(name, sums[tap]) for name, tap in zip(waits, taps)]
        where = _first_diverging(pairs, [sets[number] for sets in execution.sums], tolerance)
        what = f"{program.degree} {who} against the lanes in one process"
        comparisons.append(worst_comparison(what, size, have, whole, tolerance, noise, where))
        replays = [results[number] for results in execution.replays]
        if any(replays):
            rows = _prefix_logits(streaming, flat[0], logits, program.call.logits)
            what = f"{program.degree} {who} with a KV cache against the lanes without"
            replayed_rows = [_tensors(by_capacity.values()) for by_capacity in replays]
            comparisons.append(
                worst_comparison(what, size, replayed_rows, (rows,) * len(replayed_rows[0]), tolerance, noise)
            )
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
