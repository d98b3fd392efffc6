"""Contract 1, second half: N real ranks compute what all lanes compute in one process."""

from __future__ import annotations

from pathlib import Path

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.single.streaming import StreamingProgram, read_from_lane_files
from kraken_compiler.backends.torch_dist.lane_files import lane_file
from kraken_compiler.backends.torch_dist.load import load_program
from kraken_compiler.ir.sample_inputs import sample_inputs
from kraken_compiler.runtime.execute import execute_on_ranks
from kraken_compiler.runtime.replay import expected, split_lengths
from kraken_compiler.verify.compare import Comparison, largest_errors, rank_tolerance, worst_comparison


def compare_with_ranks(directory: Path, sizes: tuple[tuple[int, int], ...], timeout: float) -> list[Comparison]:
    """Run an artifact's programs on one process per lane, and its lanes in this process, on the same inputs.

    A program with a KV cache is also fed the same tokens a prompt first and then one by one, prompts of different
    lengths in one batch, and must give the logits of the full run.

    Args:
        directory: The artifact.
        sizes: Batch and sequence sizes to try.
        timeout: Seconds without progress after which a rank counts as hanging.

    Raises:
        RankFailedError: A rank died or hung.
        InputFileError: A file of the artifact is damaged.
    """
    artifact = open_artifact(directory, verify=False)
    program = load_program(artifact)
    inputs = [sample_inputs(program, *size, seed) for seed, size in enumerate(sizes)]
    executed = execute_on_ranks(directory, inputs, timeout=timeout)
    read_lane = read_from_lane_files([artifact.path(lane_file(lane)) for lane in range(program.degree)])
    lanes, reordered = (StreamingProgram(program, read_lane, reverse_sums=reverse) for reverse in (False, True))
    comparisons = []
    for number, size in enumerate(sizes):
        flat = list(inputs[number].values())
        want = lanes.run_flat(flat)
        _, noise = largest_errors(reordered.run_flat(flat), want)
        tolerance = rank_tolerance(want[0].dtype, noise)
        ranks = [results[number] for results in executed.outputs]
        what = f"{program.degree} ranks against the lanes in one process"
        comparisons.append(worst_comparison(what, size, ranks, want, tolerance, noise))
        replayed = [(results[number],) for results in executed.replayed if results]
        if replayed:
            logits = want[program.call.logits]
            rows = expected(logits, *split_lengths(*size))
            what = f"{program.degree} ranks with a KV cache against the lanes without"
            comparisons.append(worst_comparison(what, size, replayed, (rows,), tolerance, noise))
    return comparisons
