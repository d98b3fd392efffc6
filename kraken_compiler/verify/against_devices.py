"""Contract 1 for ONNX: N real devices compute what all lanes compute in one process, and every sum on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.onnx_ort.format import OWN, device_file
from kraken_compiler.backends.single.streaming import ReadLane, StreamingProgram
from kraken_compiler.errors import InputFileError, VerificationError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import sample_inputs
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.runtime.execute import execute_on_ranks
from kraken_compiler.runtime.replay import expected, split_lengths
from kraken_compiler.verify.compare import Comparison, errors, largest_errors, rank_tolerance, worst_comparison


def device_windows(artifact: Artifact) -> tuple[Window, ...]:
    """The schedule in the device files, which must all hold the same program.

    Raises:
        InputFileError: A file is damaged, or the files come from different compiles.
        VerificationError: A reduce is never awaited, or there are more or fewer than planned.

    Returns:
        One record per reduce; none for files that hold the collectives of ONNX Runtime's own, which have no waits.
    """
    # Imported here: onnx takes a second, and most artifacts have no device files.
    import onnx_ir

    from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
    from kraken_compiler.backends.onnx_ort.schedule import measure_windows as measure

    manifest = artifact.manifest
    paths = [artifact.path(f"onnx/{device_file(lane)}") for lane in range(manifest.degree)]
    models = [DeviceModel.load(path, verify=False) for path in paths]
    if models[0].collectives != OWN:
        return ()
    for lane, model in enumerate(models):
        if (model.lane, model.degree) != (lane, manifest.degree) or model.program != models[0].program:
            raise InputFileError(f"{model.path}: is not device {lane} of {manifest.degree} of this compile")
    return measure(onnx_ir.from_proto(models[0].proto).graph, manifest.plan)


def runnable(artifact: Artifact) -> bool:
    """True if our runtime can run the device files: they hold our collectives."""
    from kraken_compiler.backends.onnx_ort.device_model import DeviceModel

    return DeviceModel.load(artifact.path(f"onnx/{device_file(0)}"), verify=False).collectives == OWN


def compare_with_devices(
    directory: Path, program: Program, read_lane: ReadLane, sizes: Sequence[tuple[int, int]], timeout: float
) -> list[Comparison]:
    """Run an artifact's device files, one process each, and the lane program in this process, on the same inputs.

    Args:
        directory: The artifact.
        program: The lane program that the files were written from.
        read_lane: Its weights.
        sizes: Batch and sequence sizes to try.
        timeout: Seconds without progress after which a rank counts as hanging.

    Raises:
        RankFailedError: A rank died or hung.
        InputFileError: A file of the artifact is damaged.
    """
    artifact = open_artifact(directory, verify=False)
    inputs = [sample_inputs(program, *size, seed) for seed, size in enumerate(sizes)]
    executed = execute_on_ranks(directory, inputs, backend="onnx", timeout=timeout)
    lanes, reordered = (StreamingProgram(program, read_lane, reverse_sums=reverse) for reverse in (False, True))
    waits = [window.wait for window in measure_windows(program.graph)]
    names = [window.wait for window in device_windows(artifact)]
    comparisons = []
    for number, size in enumerate(sizes):
        flat = list(inputs[number].values())
        want, sums = lanes.run_with_taps(flat, waits)
        _, noise = largest_errors(reordered.run_flat(flat), want)
        logits = want[program.call.logits]
        tolerance = rank_tolerance(logits.dtype, noise)
        # With a KV cache a device gives the logits only.
        whole = want if not any(executed.replayed) else (logits,)
        have = [results[number] for results in executed.outputs]
        where = _first_diverging([sums[name] for name in waits], names, executed.sums, number, tolerance)
        what = f"{program.degree} ONNX devices against the lanes in one process"
        comparisons.append(worst_comparison(what, size, have, whole, tolerance, noise, where))
        replayed = [(results[number],) for results in executed.replayed if results]
        if replayed:
            rows = expected(logits, *split_lengths(*size))
            what = f"{program.degree} ONNX devices with a KV cache against the lanes without"
            comparisons.append(worst_comparison(what, size, replayed, (rows,), tolerance, noise))
    return comparisons


def _first_diverging(
    want: Sequence[Tensor],
    names: Sequence[str],
    ranks: Sequence[Sequence[dict[str, Tensor]]],
    number: int,
    tolerance: float,
) -> str:
    """The first sum, in the order of their starts, that a device got wrong."""
    if len(want) != len(names):
        raise VerificationError(f"the device files have {len(names)} reduces, the lane program {len(want)}")
    for expected_sum, name in zip(want, names):
        for rank, sets in enumerate(ranks):
            if not errors(sets[number][name], expected_sum)[1] <= tolerance:
                return f"the sum that {name} awaits, on device {rank}"
    return ""
