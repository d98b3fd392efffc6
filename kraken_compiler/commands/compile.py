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
from kraken_compiler.commands.auto import AutoChoice, Picker
from kraken_compiler.commands.compile_checks import (
    asked_budget,
    asked_degrees,
    asked_machine,
    require_apart,
    require_checkable,
    require_no_form,
)
from kraken_compiler.commands.source_record import max_positions, source_record, tokenizer_notes, tokenizer_saver
from kraken_compiler.errors import UsageError, VerificationError, os_errors_as
from kraken_compiler.ir.forms import DELAYED, STANDARD
from kraken_compiler.ir.program import LaneProgram, Recognized, Split
from kraken_compiler.ir.schedule import NO_OVERLAP, OVERLAPS, ROWS, TOKENS
from kraken_compiler.ir.shards import AFFINITY, ORDER, Assignment
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.latency.forms import seconds_of_forms
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.predict import Load, Predictor, RunGraphs
from kraken_compiler.latency.table import LatencyTable, latency_table
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.options.dtypes import dtype_named
from kraken_compiler.passes import stages
from kraken_compiler.passes.lower import FormChoice, find_degree, lower_native, lower_split, require_embedding
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.passes.sample_inputs import token_input
from kraken_compiler.progress import Progress, Silent
from kraken_compiler.quality.assignment.on_model import LaneChoice, require_lanes_choice
from kraken_compiler.quality.budget import Budget, Choice, SecondsOf, perplexity_increase
from kraken_compiler.quality.calibration.on_text import calibrate_on_text
from kraken_compiler.quality.calibration.record import Calibration
from kraken_compiler.quality.forms_within import forms_within
from kraken_compiler.quality.measure import with_quality
from kraken_compiler.ranks.environment import require_timeout
from kraken_compiler.surroundings import undisturbed
from kraken_compiler.text import ENCODING, replace_text, require_text
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
        if options.overlap not in OVERLAPS:
            raise UsageError(f"--overlap {options.overlap}: choose from {', '.join(OVERLAPS)}")
        require_embedding(options.embedding)
        # Without text the model is run for nothing else, and is of little use in a form that changes it.
        self.lanes = options.lanes or (AFFINITY if options.calibrate else ORDER)
        require_lanes_choice(self.lanes)
        self.backends = chosen_backends(options.backends, options.backend_options)
        self.texts = [Path(one) for one in options.calibrate]
        self.dumps = Path(options.dump_directory) if options.dump_directory is not None else None
        self.dtype = dtype_named(options.dtype)
        self.degrees = asked_degrees(options)
        self.load = Load(options.prompt, 1, options.new_tokens)
        self.budget = asked_budget(options, is_plan=directory is None)
        self.machine = asked_machine(options, is_plan=directory is None)
        require_checkable(options, self.backends)
        if directory is not None and self.dumps is not None:
            require_apart(directory, self.dumps)
        if directory is not None and isinstance(model, str | os.PathLike):
            # Before the work: what an artifact notes of its source is text.
            require_text(os.path.abspath(model), "the path of MODEL, which the artifact notes")
        self.notes: tuple[str, ...] = ()
        self.comparisons: tuple[Comparison, ...] = ()
        self.skipped: tuple[str, ...] = ()
        self.choice: Choice | None = None
        self.auto: AutoChoice | None = None
        self.calibration: Calibration | None = None
        self.verification: Verification | None = None

    def run(self) -> CompileResult:
        """Compile, or plan."""
        candidates = (self.model, self.options.text, *self.texts)
        inputs = [Path(one) for one in candidates if isinstance(one, str | os.PathLike)]
        # From the beginning: a rival must hear of it before it has worked for hours.
        place = self.directory
        with reserved(place, self.options.force, inputs) if place is not None else nullcontext() as reservation:
            captured = self._capture()
            runner = PassRunner(self.dumps)
            # A plan reads no weight, so there is nothing to choose lanes by.
            by_affinity = self.lanes == AFFINITY and reservation is not None
            lane_choice = self._lane_choice(captured) if by_affinity and captured.lanes is None else None
            latencies = []
            split: Split | None = None
            if self.options.auto:
                split, program = self._picked(captured, lane_choice, runner)
            else:
                recognized = self._recognized(captured, runner)
                for degree in self.degrees:
                    split = self._split(recognized, degree, lane_choice, runner)
                    program = self._in_form(captured, split, degree, runner)
                    if self.machine is not None and reservation is None:
                        latencies.append(self._latencies(captured, split, program, self.machine))
            report = make_report(program, runner.history, self.notes)
            if reservation is None:
                return CompileResult(report, notes=self.notes, latencies=tuple(latencies), auto=self.auto)
            program, read = self._compare_and_calibrate(captured, split, program)
            report = report.with_halves(program)
            artifact_directory = self._write(captured, program, read, report, reservation)
        return CompileResult(
            report,
            self.verification,
            artifact_directory,
            self.notes,
            self.calibration,
            self.choice,
            auto=self.auto,
        )

    def _picked(
        self, captured: Capture, lane_choice: LaneChoice | None, runner: PassRunner
    ) -> tuple[Split, LaneProgram]:
        """The program of the least predicted time. Recognised once, and split once for every degree."""
        assert self.machine is not None, "--auto needs one"
        recognized = self._recognized(captured, runner)
        if recognized is None:
            raise UsageError("--auto: a Kraken model has the lanes and the form that it was trained with; leave it out")
        picker = Picker(
            predictor=Predictor(self.machine),
            load=self.load,
            embedding=self.options.embedding,
            limit=max_positions(captured.config),
            dumps=self.dumps,
            show=self.show,
        )
        notes: dict[int, tuple[str, ...]] = {}

        def assign(planned: Split) -> Assignment:
            assert lane_choice is not None, "it is asked for"
            assignment = lane_choice(planned)
            notes[len(planned.shards[0].owned)] = lane_choice.notes
            return assignment

        def search(split: Split, seconds_of: SecondsOf) -> Choice:
            return self._within_budget(captured, split, seconds_of, f"{split.degree}.")

        degrees = [degree for degree in self.degrees if degree is not None]
        pick = picker.pick(
            recognized,
            degrees,
            runner.history,
            assign if lane_choice is not None else None,
            search if self.budget is not None else None,
        )
        self.auto, self.choice = pick.auto, pick.auto.choice
        self.notes = (*self.notes, *notes.get(pick.auto.degree, ()))
        if self.choice is not None:
            _keep_costs(self._costs_file(f"{pick.auto.degree}."), self._costs_file())
        runner.history[:] = pick.history
        overlap = TOKENS if pick.auto.in_halves else NO_OVERLAP
        return pick.split, self._rewrite(captured, pick.split, None, runner, pick.auto.forms, overlap)

    def _recognized(self, captured: Capture, runner: PassRunner) -> Recognized | None:
        """The model's layers; None of a model that has lanes of its own."""
        return stages.recognize(captured.program, runner) if captured.lanes is None else None

    def _split(
        self, recognized: Recognized | None, degree: int | None, lane_choice: LaneChoice | None, runner: PassRunner
    ) -> Split | None:
        if recognized is None:
            return None
        with self.show.stage("split"):
            lanes = find_degree(degree, recognized.layers)
            found = stages.split(recognized, lanes, runner, embedding=self.options.embedding, assign=lane_choice)
        self.notes = (*self.notes, *(lane_choice.notes if lane_choice is not None else ()))
        return found

    def _in_form(self, captured: Capture, split: Split | None, degree: int | None, runner: PassRunner) -> LaneProgram:
        """The lane program in the form that was asked for, or in the forms that a budget allows."""
        form = self.options.form
        if split is not None and self.budget is not None:
            seconds_of = None
            if self.machine is not None:
                limit = max_positions(captured.config)
                seconds_of = seconds_of_forms(split, Predictor(self.machine), self.load, limit, self.options.overlap)
            self.choice = self._within_budget(captured, split, seconds_of)
            form = _best(self.choice)
        return self._rewrite(captured, split, degree, runner, form, self.options.overlap)

    def _within_budget(self, captured: Capture, split: Split, seconds_of: SecondsOf | None, which: str = "") -> Choice:
        assert self.budget is not None, "there is something to keep to"
        tokens, passes = self.options.calibrate_tokens, self.options.calibrate_passes
        costs = self._costs_file(which)
        return forms_within(captured, split, self.texts, tokens, passes, self.budget, self.show, costs, seconds_of)

    def _costs_file(self, which: str = "") -> Path:
        """Where the costs of single layers are kept for the next search; they hold for one degree."""
        return Path(f"{self.directory}.{which}sensitivity.json")

    def _latencies(
        self, captured: Capture, split: Split | None, program: LaneProgram, machine: Machine
    ) -> LatencyTable:
        """Predicted times of a plan: the standard form's, and those of the form that was asked for."""
        with self.show.stage("predict"):
            forms = dict.fromkeys(program.plan.forms)
            name = next(iter(forms)) if len(forms) == 1 else "as asked"
            beside = {} if split is None or name == STANDARD.name else {STANDARD.name: lower_split(split, STANDARD)}
            forms_of = {**beside, name: program}
            graphs = {
                form: RunGraphs.of(one if one.cached is None else stages.with_halves(one, TOKENS))
                for form, one in forms_of.items()
            }
            most = next(iter(graphs.values())).longest(max_positions(captured.config))
            return latency_table(graphs, Predictor(machine), most=most)

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

    def _lane_choice(self, captured: Capture) -> LaneChoice:
        """Within a budget every layer may take the form that hides all it sends and changes least."""
        options = self.options
        form = options.form if self.budget is None else DELAYED.name
        return LaneChoice(captured, form, options.layers, self.texts, options.calibrate_tokens, self.show)

    def _rewrite(
        self,
        captured: Capture,
        split: Split | None,
        degree: int | None,
        runner: PassRunner,
        form: FormChoice,
        overlap: str,
    ) -> LaneProgram:
        """The lane program in a form, or in the model's own."""
        with self.show.stage("rewrite"):
            if split is None:
                assert captured.lanes is not None, "it has no split"
                require_no_form(self.options)
                program = lower_native(captured.program, captured.lanes, degree, overlap=overlap, runner=runner)
            else:
                program = lower_split(split, form, self.options.layers, overlap=overlap, runner=runner)
        if program.no_cache and token_input(program) is not None:
            no_cache = f"no KV cache, generation recomputes the prefix for every token: {program.no_cache}"
            self.notes = (*self.notes, no_cache)
        if overlap == TOKENS and program.cached is None:
            self.notes = (*self.notes, "prefills are not read as two halves, which takes a KV cache")
        self.notes = (*self.notes, *_no_halves(program))
        self.notes = (*self.notes, *(backend.cannot_run for backend in self.backends if backend.cannot_run))
        return program

    def _compare_and_calibrate(
        self, captured: Capture, split: Split | None, program: LaneProgram
    ) -> tuple[LaneProgram, SourceReader]:
        """Add the rules that a comparison with the model finds to the program, and calibrated weights."""
        options, read, standard = self.options, captured.store.read, program
        if split is not None and (options.verify or self.texts) and not is_exact(program):
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
                self.notes = (*self.notes, *_no_halves(program))
        # What a search has left in standard form is the source's already.
        if self.texts and not (self.auto is not None and is_exact(program)):
            self.calibration = calibrate_on_text(
                captured,
                standard,
                program,
                self.texts,
                options.calibrate_tokens,
                options.calibrate_passes,
                self._text,
                self.show,
            )
            program, read = self.calibration.weights.in_program(program, read)
        if self.budget is not None and self.calibration is not None:
            _require_within(self.budget, self.calibration)
        return program, read

    def _write(
        self, captured: Capture, program: LaneProgram, read: SourceReader, report: Report, reservation: Reservation
    ) -> Path:
        manifest_report = report.to_dict()
        if self.calibration is not None:
            manifest_report["calibration"] = self.calibration.to_dict()
        if self.choice is not None:
            manifest_report["choice"] = self.choice.to_dict()
        if self.auto is not None:
            manifest_report["auto"] = self.auto.to_dict()
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


def _no_halves(program: LaneProgram) -> list[str]:
    """Why a program does not run as two halves that were asked for."""
    no_split = program.cached.no_split if program.cached is not None else ""
    reasons = {"prefills are not read": no_split, "batches are not run": program.no_rows}
    return [f"{what} as two halves: {reason}" for what, reason in reasons.items() if reason]


def _keep_costs(found: Path, place: Path) -> None:
    """Have the costs of single layers of the degree that was picked where those of a compile lie."""
    if found.exists():
        with os_errors_as(f"cannot write {place}"):
            replace_text(place, found.read_text(ENCODING))


def _best(choice: Choice) -> tuple[str, ...]:
    if choice.best is None:
        if not choice.frontier:
            where = "time on that machine" if choice.standard_seconds is not None else "communication"
            raise UsageError(f"no form of any layer saves {where} beside standard: leave the budget out")
        least = min(choice.frontier, key=lambda candidate: candidate.used)
        raise VerificationError(
            f"no layer can change its form within the budget ({choice.budget}); the least that was tried costs KL "
            f"{least.kl:.3g}, perplexity {least.perplexity_increase:+.1%}: raise the budget or calibrate on more text"
        )
    return choice.best.forms


def _require_within(budget: Budget, calibration: Calibration) -> None:
    """Make sure that the result is within the budget on text that neither the search nor the calibration has seen."""
    _, quality = calibration.qualities[0]
    if not budget.holds(quality):
        raise VerificationError(
            f"the result does not keep to the budget ({budget}): on {quality.tokens:,} tokens of {quality.text} its KL "
            f"is {quality.kl:.3g}, its perplexity {perplexity_increase(quality):+.1%}; lower the budget, or calibrate "
            "on more text"
        )
