"""Contract 1, second half: N real ranks compute what all lanes compute in one process."""

from __future__ import annotations

from pathlib import Path

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.single.streaming import StreamingProgram, read_from_lane_files
from kraken_compiler.backends.torch_dist.load import load_program
from kraken_compiler.backends.torch_dist.rank_program import lane_file
from kraken_compiler.ir.sample_inputs import sample_inputs
from kraken_compiler.runtime.execute import execute_on_ranks
from kraken_compiler.verify.compare import Comparison, largest_errors, rank_tolerance


def compare_with_ranks(directory: Path, sizes: tuple[tuple[int, int], ...], timeout: float) -> list[Comparison]:
    """Run an artifact's programs on one process per lane, and its lanes in this process, on the same inputs.

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
    outputs = execute_on_ranks(directory, inputs, timeout=timeout)
    read_lane = read_from_lane_files([artifact.path(lane_file(lane)) for lane in range(program.degree)])
    lanes, reordered = (StreamingProgram(program, read_lane, reverse_sums=reverse) for reverse in (False, True))
    comparisons = []
    for number, size in enumerate(sizes):
        flat = list(inputs[number].values())
        want = lanes.run_flat(flat)
        _, noise = largest_errors(reordered.run_flat(flat), want)
        tolerance = rank_tolerance(want[0].dtype, noise)
        worst = (0.0, 0.0, 0)
        for rank, results in enumerate(outputs):
            absolute, relative = largest_errors(results[number], want)
            # A NaN is the worst there is, and compares as neither larger nor smaller.
            if not relative <= worst[1]:
                worst = (absolute, relative, rank)
        what = f"{program.degree} ranks against the lanes in one process (worst: rank {worst[2]})"
        comparisons.append(Comparison(what, size, worst[0], worst[1], tolerance, noise=noise))
    return comparisons
