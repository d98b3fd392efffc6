"""Contract 1, second half: N real ranks compute what all lanes compute in one process."""

from __future__ import annotations

from pathlib import Path

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.torch_dist.lane_files import read_weights
from kraken_compiler.backends.torch_dist.load import load_program
from kraken_compiler.ir.sample_inputs import sample_inputs
from kraken_compiler.runtime.execute import execute_on_ranks
from kraken_compiler.verify.against_lanes import compare_with_lanes
from kraken_compiler.verify.compare import Comparison


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
    return compare_with_lanes(executed, program, read_weights(artifact, program.degree), inputs, sizes, who="ranks")
