"""What real ranks computed against what all lanes compute in one process, whoever ran the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kraken_compiler.backends.single.streaming import ReadLane, StreamingProgram
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.runtime.execute import Executed
from kraken_compiler.runtime.replay import prefix_lengths, recomputed, split_lengths
from kraken_compiler.verify.compare import Comparison, errors, largest_errors, worst_comparison
from kraken_compiler.verify.tolerances import computed_dtypes, rank_tolerance


def compare_with_lanes(
    executed: Executed,
    program: Program,
    read_lane: ReadLane,
    inputs: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[tuple[int, int]],
    *,
    who: str,
    waits: Sequence[str] | None = None,
) -> list[Comparison]:
    """Compare outputs and, where ranks give them, the finished sums; with a KV cache the replayed logits too.

    Those are compared with runs without a cache on every prefix, and come from caches with room for more tokens.

    Args:
        executed: What the ranks computed.
        program: The lane program that theirs were made from.
        read_lane: Its weights.
        inputs: The input sets that the ranks were given.
        sizes: Batch and sequence size of every set.
        who: What the ranks are called, e.g. "ranks".
        waits: The ranks' names of what awaits each sum, in the order of the starts; None if they give no sums.

    Raises:
        VerificationError: The ranks have more or fewer sums than the lanes.
    """
    lanes, reordered = (StreamingProgram(program, read_lane, reverse_sums=reverse) for reverse in (False, True))
    taps = [window.wait for window in measure_windows(program.graph)] if waits is not None else []
    if len(taps) != len(waits or ()):
        raise VerificationError(f"the {who} have {len(waits or ())} reduces, the lane program {len(taps)}")
    inside = computed_dtypes(program)
    comparisons = []
    for number, size in enumerate(sizes):
        flat = list(inputs[number].values())
        want, sums = lanes.run_with_taps(flat, taps)
        _, noise = largest_errors(reordered.run_flat(flat), want)
        logits = want[program.call.logits]
        tolerance = rank_tolerance({logits.dtype} | inside, noise)
        have = [results[number] for results in executed.outputs]
        # With a KV cache some programs give the logits only.
        whole = want if len(have[0]) == len(want) else (logits,)
        pairs = [(name, sums[tap]) for name, tap in zip(waits or (), taps)]
        where = _first_diverging(pairs, [sets[number] for sets in executed.sums], tolerance)
        what = f"{program.degree} {who} against the lanes in one process"
        comparisons.append(worst_comparison(what, size, have, whole, tolerance, noise, where))
        replayed = [results[number] for results in executed.replayed]
        if any(replayed):
            rows = _recomputed(lanes, flat[0], logits, program.call.logits)
            what = f"{program.degree} {who} with a KV cache against the lanes without"
            decoded = [tuple(by_capacity.values()) for by_capacity in replayed]
            comparisons.append(worst_comparison(what, size, decoded, (rows,) * len(decoded[0]), tolerance, noise))
    return comparisons


def _recomputed(lanes: StreamingProgram, ids: Tensor, logits: Tensor, output: int) -> Tensor:
    """What a replay must give: the logits of every prefix, run on its own.

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
    found = {length: outputs[output] for length, outputs in zip(prefixes, results, strict=True)}
    return recomputed({**found, ids.shape[1]: logits}, lengths, steps)


def _first_diverging(
    wanted: Sequence[tuple[str, Tensor]], ranks: Sequence[Mapping[str, Tensor]], tolerance: float
) -> str:
    """The first sum, in the order of their starts, that a rank got wrong."""
    for name, want in wanted:
        for rank, sums in enumerate(ranks):
            if not errors(sums[name], want)[1] <= tolerance:
                return f"the sum that {name} awaits, on device {rank}"
    return ""
