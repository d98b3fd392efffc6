"""Everything that was checked about an artifact, and the run of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.single.streaming import ReadLane
from kraken_compiler.backends.torch_dist.check_schedule import check_schedule, require_overlap
from kraken_compiler.backends.torch_dist.lane_files import read_weights
from kraken_compiler.backends.torch_dist.load import load_program
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.quality.evaluate import Quality
from kraken_compiler.verify.against_devices import Devices, compare_with_devices, read_devices
from kraken_compiler.verify.against_ranks import compare_with_ranks
from kraken_compiler.verify.choose_sizes import check_sizes
from kraken_compiler.verify.compare import Comparison
from kraken_compiler.verify.show_schedule import schedule_entries, schedule_table

if TYPE_CHECKING:
    from kraken_compiler.quality.sensitivity import Sensitivity


CHECKED_BACKENDS = ("torch", "onnx")
"""The backends whose programs `verify_programs` can run; one of another backend would pass without a check."""


@dataclass(frozen=True)
class Verification:
    """What was checked.

    Attributes:
        comparisons: The program contract.
        windows: The schedule of the program that runs.
        quality: What the form costs on text; None if it was not measured.
        skipped: Checks that were not made, each with the reason.
        devices: The ONNX devices and what they ran; None without them.
        quantized: What the form and the quantized weights of the ONNX devices cost together; None if they have none.
        sensitivity: What the artifact's forms cost in single layers and from each to the end; None if nobody asked.
    """

    comparisons: tuple[Comparison, ...] = ()
    windows: tuple[Window, ...] = ()
    quality: Quality | None = None
    skipped: tuple[str, ...] = field(default=())
    devices: Devices | None = None
    quantized: Quality | None = None
    sensitivity: Sensitivity | None = None

    def require_passed(self) -> None:
        """Raise if a comparison failed.

        Raises:
            VerificationError: Names the first failed comparison.
        """
        failed = [comparison for comparison in self.comparisons if not comparison.passed]
        if failed:
            raise VerificationError(f"the program computes something else: {failed[0]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "program": {
                "max_abs_error": max((entry.max_abs_error for entry in self.comparisons), default=None),
                "max_rel_error": max((entry.max_rel_error for entry in self.comparisons), default=None),
                "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            },
            "schedule": schedule_entries(self.windows, self.devices),
            "quality": self.quality.to_dict() if self.quality else None,
            "quality_of_quantized": self.quantized.to_dict() if self.quantized else None,
            "sensitivity": self.sensitivity.to_dict() if self.sensitivity else None,
            "skipped": list(self.skipped),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        lines = [f"program   {comparison}" for comparison in self.comparisons]
        promised = [window for window in self.windows if window.promised]
        fewest = min((len(window.gemms) for window in promised), default=0)
        hidden = f"{len(promised)} hidden, each behind at least {fewest} matrix products" if promised else "none hidden"
        lines.append(f"schedule  {len(self.windows)} reduces, {hidden}")
        if promised and self.devices is not None and self.devices.runs:
            executed = min(len(one.products) for run in self.devices.runs for one in run if one.window.promised)
            lines.append(
                f"profile   ONNX Runtime ran at least {executed} matrix products between start and wait of each hidden "
                "reduce, on every device"
            )
        if self.quality is not None:
            lines += [f"quality   {line}" for line in self.quality.lines()]
        if self.quantized is not None and self.devices is not None:
            lines += [f"{self.devices.weights:<10}{line}" for line in self.quantized.lines()]
        lines += [f"skipped   {reason}" for reason in self.skipped]
        return lines + (["", *self.sensitivity.lines()] if self.sensitivity is not None else [])

    def schedule_lines(self) -> list[str]:
        """The schedule reduce by reduce, as a table for people."""
        return schedule_table(self.windows, self.devices)


@dataclass(frozen=True)
class Reference:
    """A lane program and its weights: what the programs of an artifact are compared with."""

    program: LaneProgram
    read_lane: ReadLane


def lanes_in(artifact: Artifact) -> Reference | None:
    """The lane program that the artifact itself holds; None without the torch backend."""
    if "torch" not in artifact.manifest.backends:
        return None
    program = load_program(artifact)
    return Reference(program, read_weights(artifact, program.degree))


def verify_programs(
    directory: Path,
    sizes: Sequence[tuple[int, int]] | None = None,
    timeout: float = 120.0,
    reference: Reference | None = None,
) -> Verification:
    """Check an artifact's programs: real ranks against the lanes in one process, and the schedule of what will run.

    Args:
        directory: The artifact.
        sizes: Batch and sequence sizes to try; None chooses them inside the program's rules.
        timeout: Seconds without progress after which a rank counts as hanging.
        reference: Where the lanes come from if the artifact does not hold them; without, ONNX devices are only
            checked for their schedule.

    Raises:
        VerificationError: A window that the form promises is empty, or a rank computes something else.
        RankFailedError: A rank died or hung.
    """
    artifact = open_artifact(directory, verify=False)
    unknown = [name for name in artifact.manifest.backends if name not in CHECKED_BACKENDS]
    if unknown:
        raise VerificationError(f"nothing here can check the programs of the backend '{unknown[0]}'")
    if not artifact.manifest.backends:
        raise VerificationError(f"{directory} holds no programs, so there is nothing to check")
    held = lanes_in(artifact)
    comparisons: list[Comparison] = []
    windows: tuple[Window, ...] = ()
    devices: Devices | None = None
    lanes = held or reference
    # Rows of the last size also grow in the cache, which keeps to the rules at every length.
    if sizes is None:
        sizes = check_sizes(lanes.program, growing=True) if lanes is not None else ()
    if held is not None:
        windows = check_schedule(held.program.module, held.program.plan)
        require_overlap(windows)
        comparisons += compare_with_ranks(directory, tuple(sizes), timeout)
    if "onnx" in artifact.manifest.backends:
        devices = read_devices(artifact)
        windows = devices.windows or windows
        require_overlap(windows)
        if lanes is not None:
            found, devices = compare_with_devices(devices, lanes.program, lanes.read_lane, sizes, timeout)
            comparisons += found
    return Verification(tuple(comparisons), windows, devices=devices)
