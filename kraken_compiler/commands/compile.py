"""`compile_model`: from a model to an artifact, checked before it is put in place."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.artifact.reservation import Reservation, reserved
from kraken_compiler.backends.base import Reference
from kraken_compiler.backends.registry import chosen_backends, lanes_in
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.capture import Capture, Model, capture
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.commands.auto import AutoChoice
from kraken_compiler.commands.compile_checks import Asked, require_apart, require_checkable
from kraken_compiler.commands.rewriting import Rewritten, no_halves, rewrite
from kraken_compiler.commands.source_record import source_record, tokenizer_notes, tokenizer_saver
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import ROWS
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.latency.table import LatencyTable
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.options.dtypes import dtype_named
from kraken_compiler.passes import stages
from kraken_compiler.passes.lower import lower_split
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.budget import Budget, Choice, perplexity_increase
from kraken_compiler.quality.calibration.on_text import calibrate_on_text
from kraken_compiler.quality.calibration.record import Calibration
from kraken_compiler.quality.measure import with_quality
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.surroundings import undisturbed
from kraken_compiler.text import require_text
from kraken_compiler.texts.read import TextChoice
from kraken_compiler.verify.against_model import compare_with_model, with_rules
from kraken_compiler.verify.compare import Comparison
from kraken_compiler.verify.report import Report, is_exact, make_report
from kraken_compiler.verify.verification import Verification, verify_programs


@dataclass(frozen=True)
class CompileResult:
    """Result of a compile.

    Attributes:
        report: What was recognised and scheduled.
        verification: What was checked; None if checking was switched off, or nothing was written.
        directory: The artifact; None if only a plan was asked for.
        notes: What a user should know about the capture, one sentence each.
        calibration: What calibration did; None if there was none.
        choice: How the forms were chosen; None if they were given.
        latencies: Predicted times, for every degree that a plan was asked for; none without a machine.
        auto: What was picked for the least predicted time; None if that was not asked for.
    """

    report: Report
    verification: Verification | None = None
    directory: Path | None = None
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None
    choice: Choice | None = None
    latencies: tuple[LatencyTable, ...] = ()
    auto: AutoChoice | None = None


def compile_model(
    model: Model,
    directory: str | os.PathLike[str] | None,
    options: CompileOptions | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> CompileResult:
    """Compile a model into an artifact directory, checked before it is put in place.

    Args:
        model: A module, or a path: a Hugging Face directory, a `.gguf` file, a torch.export archive, a pickled module.
        directory: Where the artifact goes; None only plans: no weight is read and nothing is written.
        options: What is asked for; None takes the keywords.
        example_inputs: See `transform`.
        progress: Is told about long stages.
        keywords: Options by name, those of backends among them: `degree=4`, `onnx_weights="int8"`.

    Raises:
        UsageError, UnsupportedModelError, InputFileError: See `transform`.
        VerificationError: A program computes something else, lost its overlap, or the budget does not hold; nothing is
            written then.
        RankFailedError: A rank died or hung while the programs were checked; nothing is written then.
    """
    options = options if options is not None else CompileOptions.of(keywords)
    place = Path(directory) if directory is not None else None
    with undisturbed():
        return _Compile(model, place, options, example_inputs, progress or Silent()).run()


class _Compile:
    """One compile, step by step."""

    def __init__(
        self,
        model: Model,
        directory: Path | None,
        options: CompileOptions,
        example_inputs: ExampleInputs | None,
        show: Progress,
    ) -> None:
        """Check all that can be wrong before any work."""
        self.model, self.directory, self.options = model, directory, options
        self.example_inputs, self.show = example_inputs, show
        require_timeout(options.timeout)
        self.asked = Asked.of(options, directory)
        self.backends = chosen_backends(options.backends, options.backend_options)
        self.dtype = dtype_named(options.dtype)
        require_checkable(options, self.backends)
        if directory is not None and self.asked.dumps is not None:
            require_apart(directory, self.asked.dumps)
        if directory is not None and isinstance(model, str | os.PathLike):
            # Before the work: what an artifact notes of its source is text.
            require_text(os.path.abspath(model), "the path of MODEL, which the artifact notes")
        self.notes: tuple[str, ...] = ()
        self.comparisons: tuple[Comparison, ...] = ()
        self.skipped: tuple[str, ...] = ()
        self.calibration: Calibration | None = None
        self.verification: Verification | None = None

    def run(self) -> CompileResult:
        """Compile, or plan."""
        candidates = (self.model, self.options.text, *self.asked.texts)
        inputs = [Path(one) for one in candidates if isinstance(one, str | os.PathLike)]
        # From the beginning: a rival must hear of it before it has worked for hours.
        place = self.directory
        with reserved(place, self.options.force, inputs) if place is not None else nullcontext() as reservation:
            captured = self._capture()
            rewritten = rewrite(captured, self.asked, self.show)
            cannot_run = (backend.cannot_run for backend in self.backends if backend.cannot_run)
            self.notes = (*self.notes, *rewritten.notes, *cannot_run)
            report = make_report(rewritten.program, rewritten.history, self.notes)
            artifact_directory = None
            if reservation is not None:
                program, read = self._compare_and_calibrate(captured, rewritten)
                report = report.with_halves(program)
                artifact_directory = self._write(captured, rewritten, program, read, report, reservation)
        return CompileResult(
            report,
            self.verification,
            artifact_directory,
            self.notes,
            self.calibration,
            rewritten.choice,
            rewritten.latencies,
            rewritten.auto,
        )

    def _capture(self) -> Capture:
        with self.show.stage("capture"):
            captured = capture(
                self.model,
                example_inputs=self.example_inputs,
                input_specs=self.options.input_specs,
                trust_pickle=self.options.trust_pickle,
                dtype=self.dtype,
                require_weights=self.directory is not None,
                hash_early=self.directory is not None,
            )
            self.notes = (*captured.notes, *tokenizer_notes(captured))
        return captured

    def _compare_and_calibrate(self, captured: Capture, rewritten: Rewritten) -> tuple[LaneProgram, SourceReader]:
        """Add the rules that a comparison with the model finds to the program, and calibrated weights."""
        options, read, texts = self.options, captured.store.read, self.asked.texts
        split, standard, program = rewritten.split, rewritten.program, rewritten.program
        if split is not None and (options.verify or texts) and not is_exact(program):
            standard = lower_split(split, "standard", cached=False)
        if options.verify:
            with self.show.stage("compare with the source"):
                check = compare_with_model(captured, standard)
            self.comparisons, self.skipped = check.comparisons, check.skipped
            Verification(self.comparisons).require_passed()
            program, self.notes = with_rules(program, check.rules), (*self.notes, *check.notes)
            if check.rules and program.rows is not None:
                # Perhaps not every number of rows suits it.
                program = stages.with_halves(replace(program, rows=None), ROWS)
                self.notes = (*self.notes, *no_halves(program))
        # What a search has left in standard form is the source's already.
        if texts and not (rewritten.auto is not None and is_exact(program)):
            self.calibration = calibrate_on_text(
                captured,
                standard,
                program,
                texts,
                options.calibrate_tokens,
                options.calibrate_passes,
                self._text,
                self.show,
            )
            program, read = self.calibration.weights.in_program(program, read)
        if self.asked.budget is not None and self.calibration is not None:
            _require_within(self.asked.budget, self.calibration)
        return program, read

    def _write(
        self,
        captured: Capture,
        rewritten: Rewritten,
        program: LaneProgram,
        read: SourceReader,
        report: Report,
        reservation: Reservation,
    ) -> Path:
        manifest_report = report.to_dict()
        if self.calibration is not None:
            manifest_report["calibration"] = self.calibration.to_dict()
        if rewritten.choice is not None:
            manifest_report["choice"] = rewritten.choice.to_dict()
        if rewritten.auto is not None:
            manifest_report["auto"] = rewritten.auto.to_dict()
        lanes = Reference(program, read_from_source(program, read))
        verify = self.options.verify
        with self.show.steps("write and check" if verify else "write") as advance:
            return write_artifact(
                program,
                program.reader(read),
                reservation.target,
                source=source_record(captured, self.options.input_specs, self.dtype),
                backends=self.backends,
                digest=(lambda: captured.origin.sha256) if captured.origin.path else None,
                tokenizer_saver=tokenizer_saver(captured),
                report=manifest_report,
                options=self.options.noted(),
                check=(lambda partial: self._check(partial, captured, lanes)) if verify else None,
                resumable=self.calibration is None,
                reservation=reservation,
                progress=advance,
            )

    def _check(self, partial: Path, captured: Capture, in_memory: Reference) -> dict[str, object]:
        """Check the complete artifact before it is put in place."""
        captured.store.release()  # what comes now are other processes
        with self.show.stage("run on ranks"):
            ranks_verification = verify_programs(partial, None, self.options.timeout, in_memory)
        verification = replace(
            ranks_verification, comparisons=(*self.comparisons, *ranks_verification.comparisons), skipped=self.skipped
        )
        verification.require_passed()
        artifact = open_artifact(partial, verify=False)
        lanes = lanes_in(artifact) or in_memory
        self.verification = with_quality(verification, artifact, lanes, captured, self._text, self.show)
        return self.verification.to_dict()

    @property
    def _text(self) -> TextChoice:
        """The text that a changed form is measured on."""
        return TextChoice.of(self.options.text, self.options.text_tokens)


def _require_within(budget: Budget, calibration: Calibration) -> None:
    """Make sure that the result is within the budget on text that neither the search nor the calibration has seen."""
    _, quality = calibration.qualities[0]
    if not budget.holds(quality):
        raise VerificationError(
            f"the result does not keep to the budget ({budget}): on {quality.tokens:,} tokens of {quality.text} its KL "
            f"is {quality.kl:.3g}, its perplexity {perplexity_increase(quality):+.1%}; lower the budget, or calibrate "
            "on more text"
        )
