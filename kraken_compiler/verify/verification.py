"""Verification of an artifact: the run of its checks, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.base import Backend, Reference
from kraken_compiler.backends.lane_graph.run_graph import on_host
from kraken_compiler.backends.registry import backend_of, backends_of, lanes_in
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import RanWindow, Window
from kraken_compiler.passes.sample_inputs import sample_inputs
from kraken_compiler.verify.against_lanes import compare_with_lanes
from kraken_compiler.verify.choose_sizes import check_sizes
from kraken_compiler.verify.compare import Comparison
from kraken_compiler.verify.execute import Execution, execute_on_ranks
from kraken_compiler.verify.in_float32 import can_be_in_float32, in_float32, program_in_float32
from kraken_compiler.verify.overlap import require_overlap, require_run_overlap
from kraken_compiler.verify.show_schedule import hiding, schedule_entries, schedule_table
from kraken_compiler.verify.tolerances import is_within_noise, with_noise_allowed

if TYPE_CHECKING:
    from kraken_compiler.lanes.evaluate import Quality
    from kraken_compiler.quality.multiple_choice import Accuracy
    from kraken_compiler.quality.sensitivity import Sensitivity


@dataclass(frozen=True)
class BackendCheck:
    """Results of the checks of a backend's programs.

    Attributes:
        backend: The backend.
        windows: The schedule in them, one record per reduce; none if nothing here runs them.
        lanes: What they must compute; None if nobody has it.
        runs: What every rank ran, rank 0 first; empty if none told.
        run_size: Batch and sequence size of that run.
        halves: The schedule of a prefill or a batch that runs as two halves, if one can.
    """

    backend: Backend[Any]
    windows: tuple[Window, ...] = ()
    lanes: Reference | None = None
    runs: tuple[tuple[RanWindow, ...], ...] = ()
    run_size: tuple[int, int] = (0, 0)
    halves: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Verification:
    """Results of the checks of an artifact.

    Attributes:
        comparisons: The program contract.
        windows: The schedule of the program that runs.
        quality: What the form costs on text; None if it was not measured.
        skipped: Checks that were not made, each with the reason.
        checks: What was found out about every backend's programs.
        rounded: What the form and the rounded weights of a backend cost together, by what they are rounded to.
        halves: The schedule of a prefill or a batch that runs as two halves, if one can.
        accuracies: How often multiple-choice questions were answered rightly, for every file of them.
        sensitivity: What the artifact's forms cost in single layers and from each to the end; None if nobody asked.
    """

    comparisons: tuple[Comparison, ...] = ()
    windows: tuple[Window, ...] = ()
    quality: Quality | None = None
    skipped: tuple[str, ...] = field(default=())
    checks: tuple[BackendCheck, ...] = ()
    rounded: Mapping[str, Quality] = field(default_factory=dict)
    halves: tuple[Window, ...] = ()
    accuracies: tuple[Accuracy, ...] = ()
    sensitivity: Sensitivity | None = None

    def require_passed(self) -> None:
        """Raise if a comparison failed.

        Raises:
            VerificationError: Names the first failed comparison.
        """
        failures = [comparison for comparison in self.comparisons if not comparison.passed]
        if failures:
            raise VerificationError(f"the program computes something else: {failures[0]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "program": {
                "max_abs_error": max((entry.max_abs_error for entry in self.comparisons), default=None),
                "max_rel_error": max((entry.max_rel_error for entry in self.comparisons), default=None),
                "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            },
            "schedule": schedule_entries(self.windows, self._runs),
            "schedule_of_halves": schedule_entries(self.halves, ()),
            "quality": self.quality.to_dict() if self.quality else None,
            "quality_of_rounded_weights": {name: quality.to_dict() for name, quality in self.rounded.items()},
            "multiple_choice": [accuracy.to_dict() for accuracy in self.accuracies],
            "sensitivity": self.sensitivity.to_dict() if self.sensitivity else None,
            "skipped": list(self.skipped),
        }

    def lines(self) -> list[str]:
        """Lines for people."""
        lines = [f"program   {comparison}" for comparison in self.comparisons]
        lines.append(f"schedule  {len(self.windows)} reduces, {hiding(self.windows)}")
        if self.halves:
            lines.append(f"schedule  {len(self.halves)} reduces in two halves, {hiding(self.halves)}")
        for check in self.checks if any(window.promised for window in self.windows) else ():
            if check.runs:
                fewest_run = min(len(one.products) for run in check.runs for one in run if one.window.promised)
                lines.append(
                    f"profile   the {check.backend.ranks_are} ran at least {fewest_run} matrix products between start "
                    "and wait of each hidden reduce"
                )
        if self.quality is not None:
            lines += [f"quality   {line}" for line in self.quality.lines()]
        for name, quality in self.rounded.items():
            lines += [f"{name:<10}{line}" for line in quality.lines()]
        lines += [f"choices   {accuracy.line()}" for accuracy in self.accuracies]
        lines += [f"skipped   {reason}" for reason in self.skipped]
        return lines + (["", *self.sensitivity.lines()] if self.sensitivity is not None else [])

    def schedule_lines(self) -> list[str]:
        """The schedule reduce by reduce, as a table for people."""
        run_size = next((check.run_size for check in self.checks if check.runs), (0, 0))
        return schedule_table(self.windows, self._runs, run_size)

    @property
    def _runs(self) -> Sequence[Sequence[RanWindow]]:
        """The windows of every rank's run, of the first backend whose ranks tell."""
        return next((check.runs for check in self.checks if check.runs), ())


def verify_programs(
    directory: Path,
    sizes: Sequence[tuple[int, int]] | None = None,
    timeout: float = 120.0,
    lanes: Reference | None = None,
    backend: str | None = None,
) -> Verification:
    """Check an artifact's programs: real ranks against the lanes in one process, and the schedule of what will run.

    Args:
        directory: The artifact.
        sizes: Batch and sequence sizes to try; None chooses them inside the program's rules.
        timeout: Seconds without progress after which a rank counts as hanging.
        lanes: Where the lanes come from if the artifact does not hold them; without, programs are only checked for
            their schedule.
        backend: Name of the backend whose programs are checked; None checks those of all.

    Raises:
        UsageError: The artifact has no programs of that backend.
        VerificationError: A window that the form promises is empty, or a rank computes something else.
        RankFailedError: A rank died or hung.
    """
    artifact = open_artifact(directory, verify=False)
    if not artifact.manifest.backends:
        raise VerificationError(f"{directory} holds no programs, so there is nothing to check")
    lanes = lanes_in(artifact) or lanes
    comparisons: list[Comparison] = []
    checks = []
    for one in [backend_of(artifact, backend)] if backend is not None else backends_of(artifact):
        check, backend_comparisons = _check(one, artifact, lanes, sizes, timeout)
        checks.append(check)
        comparisons += backend_comparisons
    windows = next((check.windows for check in reversed(checks) if check.windows), ())
    halves = next((check.halves for check in checks if check.halves), ())
    return Verification(tuple(comparisons), windows, checks=tuple(checks), halves=halves)


def _check(
    backend: Backend[Any],
    artifact: Artifact,
    lanes: Reference | None,
    sizes: Sequence[tuple[int, int]] | None,
    timeout: float,
) -> tuple[BackendCheck, list[Comparison]]:
    if not backend.gives_reference:
        raise VerificationError(f"nothing here can check the programs of the backend '{backend.name}'")
    windows = backend.schedule(artifact)
    require_overlap(windows)
    halves = backend.split_schedule(artifact)
    require_overlap(halves)
    reference = backend.reference(artifact, lanes)
    check = BackendCheck(backend, windows, reference, halves=halves)
    if reference is None or backend.cannot_run:
        return check, []
    if sizes is None:
        # Rows of the last size also grow in the cache, which keeps to the rules at every length.
        sizes = check_sizes(reference.program, growing=True)
    inputs, execution = _run(backend, artifact, reference, sizes, timeout)
    runs = tuple(run for record in execution.records if (run := backend.ran(record, windows)))
    require_run_overlap(runs)
    comparisons = compare_with_lanes(execution, reference, inputs, sizes, windows, who=backend.ranks_are)
    failed = [one for one in comparisons if not one.passed]
    if failed and all(map(is_within_noise, failed)) and backend.runs_lane_files and can_be_in_float32(artifact):
        comparisons = [with_noise_allowed(one) for one in comparisons]
        comparisons += _compare_in_float32(backend, artifact, reference, sizes, timeout)
    return replace(check, runs=runs, run_size=sizes[-1]), comparisons


def _compare_in_float32(
    backend: Backend[Any], artifact: Artifact, reference: Reference, sizes: Sequence[tuple[int, int]], timeout: float
) -> list[Comparison]:
    """Compare what is too noisy in half precision to be told from a wrong program."""
    with in_float32(artifact, backend.name) as exact:
        lanes = backend.reference(exact, replace(reference, program=program_in_float32(reference.program)))
        assert lanes is not None, "they were given"
        inputs, execution = _run(backend, exact, lanes, sizes, timeout)
        who = f"{backend.ranks_are} in float32"
        return compare_with_lanes(execution, lanes, inputs, sizes, backend.schedule(exact), who=who)


def _run(
    backend: Backend[Any], artifact: Artifact, reference: Reference, sizes: Sequence[tuple[int, int]], timeout: float
) -> tuple[list[dict[str, Tensor]], Execution]:
    """Run an artifact's ranks on an input set of every size; numpy knows no bfloat16, for which it takes float32."""
    inputs = [sample_inputs(reference.program, *size, seed) for seed, size in enumerate(sizes)]
    arrays = [{name: on_host(value) for name, value in input_set.items()} for input_set in inputs]
    return inputs, execute_on_ranks(artifact.directory, arrays, backend.name, timeout=timeout)
