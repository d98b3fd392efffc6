"""Contract 1 for ONNX: N real devices compute what all lanes compute in one process, and overlap as they promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.onnx_ort.check_run import RanWindow, ran_windows, require_run_overlap
from kraken_compiler.backends.onnx_ort.format import OWN, device_path
from kraken_compiler.backends.single.streaming import ReadLane
from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.sample_inputs import sample_inputs
from kraken_compiler.ir.schedule import Window
from kraken_compiler.runtime.execute import execute_on_ranks
from kraken_compiler.verify.against_lanes import compare_with_lanes
from kraken_compiler.verify.compare import Comparison


@dataclass(frozen=True)
class Devices:
    """An artifact's ONNX devices.

    Attributes:
        directory: The artifact.
        windows: The schedule in their files, one record per reduce; none for files that hold the collectives of ONNX
            Runtime's own, which have no waits.
        runnable: True if our runtime can run them: they hold our collectives.
        weights: What the weights of their products are quantized to, see `format.WEIGHT_KINDS`; None if they are not.
        runs: What every device ran, device 0 first; empty before they ran.
        profiled: Batch and sequence size of that run.
    """

    directory: Path
    windows: tuple[Window, ...]
    runnable: bool
    weights: str | None = None
    runs: tuple[tuple[RanWindow, ...], ...] = ()
    profiled: tuple[int, int] = (0, 0)


def read_devices(artifact: Artifact) -> Devices:
    """Read the device files, which must all hold the same program.

    Raises:
        InputFileError: A file is damaged, or the files come from different compiles.
        VerificationError: A reduce is never awaited, or there are more or fewer than planned.
    """
    # Imported here: onnx takes a second, and most artifacts have no device files.
    import onnx_ir

    from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
    from kraken_compiler.backends.onnx_ort.schedule import measure_windows

    manifest = artifact.manifest
    paths = [artifact.path(device_path(lane)) for lane in range(manifest.degree)]
    models = [DeviceModel.load(path, verify=False) for path in paths]
    for lane, model in enumerate(models):
        if (model.lane, model.degree) != (lane, manifest.degree) or model.program != models[0].program:
            raise InputFileError(f"{model.path}: is not device {lane} of {manifest.degree} of this compile")
    if models[0].collectives != OWN:
        return Devices(artifact.directory, (), runnable=False, weights=models[0].weights)
    # One device has nobody to add up with, so its model keeps none of the planned reduces.
    plan = manifest.plan if manifest.degree > 1 else None
    windows = measure_windows(onnx_ir.from_proto(models[0].proto).graph, plan)
    return Devices(artifact.directory, windows, runnable=True, weights=models[0].weights)


def compare_with_devices(
    devices: Devices, program: Program, read_lane: ReadLane, sizes: Sequence[tuple[int, int]], timeout: float
) -> tuple[list[Comparison], Devices]:
    """Run device files, one process each, and the lane program in this process, on the same inputs.

    The last size is run with ONNX Runtime's profiler on, which shows what every device ran between each start and wait.

    Args:
        devices: Those of an artifact; ones that are not runnable are not run.
        program: The lane program that the files were written from.
        read_lane: Its weights.
        sizes: Batch and sequence sizes to try.
        timeout: Seconds without progress after which a rank counts as hanging.

    Raises:
        RankFailedError: A rank died or hung.
        InputFileError: A file of the artifact is damaged.
        VerificationError: A device ran no matrix product where the form promises some, or other reduces than planned.

    Returns:
        The comparisons, and the devices with their runs.
    """
    if not devices.runnable:
        return [], devices
    inputs = [sample_inputs(program, *size, seed) for seed, size in enumerate(sizes)]
    executed = execute_on_ranks(devices.directory, inputs, backend="onnx", timeout=timeout)
    runs = tuple(ran_windows(events, devices.windows) for events in executed.events)
    require_run_overlap(runs)
    # A single device keeps no reduces, the lane program of one lane does.
    waits = [window.wait for window in devices.windows] if program.degree > 1 else None
    if devices.weights is not None:
        from kraken_compiler.backends.onnx_ort.device_model import DeviceModel
        from kraken_compiler.backends.onnx_ort.quantized_lanes import read_as_quantized

        first = DeviceModel.load(devices.directory / device_path(0), verify=False)
        read_lane = read_as_quantized(first, read_lane)
    comparisons = compare_with_lanes(executed, program, read_lane, inputs, sizes, who="ONNX devices", waits=waits)
    return comparisons, replace(devices, runs=runs, profiled=sizes[-1])
