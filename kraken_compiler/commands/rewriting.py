"""From a captured model to its lane program: the degree, the lanes and the forms that are asked for or chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kraken_compiler.capture import Capture
from kraken_compiler.commands.auto import AutoChoice, Picker
from kraken_compiler.commands.compile_checks import Asked, require_no_form
from kraken_compiler.commands.source_record import max_positions
from kraken_compiler.errors import UsageError, VerificationError, os_errors_as
from kraken_compiler.ir.forms import DELAYED, STANDARD
from kraken_compiler.ir.program import LaneProgram, Recognized, Split
from kraken_compiler.ir.schedule import NO_OVERLAP, TOKENS
from kraken_compiler.ir.shards import AFFINITY, Assignment
from kraken_compiler.latency.forms import seconds_of_forms
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.predict import Predictor, RunGraphs
from kraken_compiler.latency.table import LatencyTable, latency_table
from kraken_compiler.passes import stages
from kraken_compiler.passes.lower import FormChoice, find_degree, lower_native, lower_split
from kraken_compiler.passes.manager import PassRecord, PassRunner
from kraken_compiler.passes.sample_inputs import token_input
from kraken_compiler.progress import Progress
from kraken_compiler.quality.assignment.on_model import LaneChoice
from kraken_compiler.quality.budget import Choice, SecondsOf
from kraken_compiler.quality.forms_within import forms_within
from kraken_compiler.text import ENCODING, replace_text


@dataclass(frozen=True)
class Rewritten:
    """A model as a lane program.

    Attributes:
        program: The lane program.
        split: What any form is made of; None of a Kraken model, which has lanes and a form of its own.
        history: The records of the passes.
        notes: What a user should know, one sentence each.
        choice: How the forms were chosen; None if they were given.
        auto: What was picked for the least predicted time; None if that was not asked for.
        latencies: Predicted times, for every degree that a plan was asked for; none without a machine.
    """

    program: LaneProgram
    split: Split | None
    history: tuple[PassRecord, ...]
    notes: tuple[str, ...]
    choice: Choice | None = None
    auto: AutoChoice | None = None
    latencies: tuple[LatencyTable, ...] = ()


def rewrite(captured: Capture, asked: Asked, show: Progress) -> Rewritten:
    """Rewrite a model.

    Args:
        captured: The model.
        asked: What is asked for. Beside the artifact a search keeps what it has measured.
        show: Is told how far it is.

    Raises:
        UsageError, UnsupportedModelError: See `lower`.
        VerificationError: No form keeps to the budget.
    """
    return _Rewriting(captured, asked, show).run()


class _Rewriting:
    """One rewrite, step by step."""

    def __init__(self, captured: Capture, asked: Asked, show: Progress) -> None:
        self.captured, self.asked, self.show = captured, asked, show
        self.runner = PassRunner(asked.dumps)
        # A plan reads no weight, so there is nothing to choose lanes by; a Kraken model has its own.
        by_affinity = asked.lanes == AFFINITY and asked.directory is not None and captured.lanes is None
        self.lane_choice = self._lane_choice() if by_affinity else None
        self.notes: tuple[str, ...] = ()
        self.choice: Choice | None = None
        self.auto: AutoChoice | None = None

    def run(self) -> Rewritten:
        latencies = []
        split: Split | None
        if self.captured.lanes is not None:
            require_no_form(self.asked.options)
            recognized = None
        else:
            recognized = stages.recognize(self.captured.program, self.runner)
        if recognized is not None and self.asked.options.auto:
            split, program = self._picked(recognized)
        else:
            for degree in self.asked.degrees:
                split, program = self._of_degree(recognized, degree)
                if self.asked.machine is not None and self.asked.directory is None:
                    latencies.append(self._latencies(split, program, self.asked.machine))
        return Rewritten(
            program,
            split,
            tuple(self.runner.history),
            tuple(dict.fromkeys(self.notes)),
            self.choice,
            self.auto,
            tuple(latencies),
        )

    def _picked(self, recognized: Recognized) -> tuple[Split, LaneProgram]:
        """The program of the least predicted time. Split once for every degree."""
        assert self.asked.machine is not None, "--auto needs one"
        lane_choice = self.lane_choice
        picker = Picker(
            predictor=Predictor(self.asked.machine),
            load=self.asked.load,
            embedding=self.asked.options.embedding,
            limit=max_positions(self.captured.config),
            dumps=self.asked.dumps,
            show=self.show,
        )
        notes: dict[int, tuple[str, ...]] = {}

        def assign(planned: Split) -> Assignment:
            assert lane_choice is not None, "it is asked for"
            assignment = lane_choice(planned)
            notes[len(planned.shards[0].owned)] = lane_choice.notes
            return assignment

        def search(split: Split, seconds_of: SecondsOf) -> Choice:
            return self._within_budget(split, seconds_of, f"{split.degree}.")

        degrees = [degree for degree in self.asked.degrees if degree is not None]
        pick = picker.pick(
            recognized,
            degrees,
            self.runner.history,
            assign if lane_choice is not None else None,
            search if self.asked.budget is not None else None,
        )
        self.auto, self.choice = pick.auto, pick.auto.choice
        self.notes = (*notes.get(pick.auto.degree, ()), *picker.predictor.notes)
        if self.choice is not None:
            _keep_costs(self._costs_file(f"{pick.auto.degree}."), self._costs_file())
        self.runner.history[:] = pick.history
        overlap = TOKENS if pick.auto.in_halves else NO_OVERLAP
        return pick.split, self._in_form(pick.split, None, pick.auto.forms, overlap)

    def _of_degree(self, recognized: Recognized | None, degree: int | None) -> tuple[Split | None, LaneProgram]:
        """The program in the form that was asked for, or in the forms that a budget allows."""
        options = self.asked.options
        if recognized is None:
            return None, self._in_form(None, degree, options.form, options.overlap)
        with self.show.stage("split"):
            lanes = find_degree(degree, recognized.layers)
            split = stages.split(recognized, lanes, self.runner, embedding=options.embedding, assign=self.lane_choice)
        self.notes = (*self.notes, *(self.lane_choice.notes if self.lane_choice is not None else ()))
        form: FormChoice = options.form
        if self.asked.budget is not None:
            predictor = Predictor(self.asked.machine) if self.asked.machine is not None else None
            seconds_of = None
            if predictor is not None:
                limit = max_positions(self.captured.config)
                seconds_of = seconds_of_forms(split, predictor, self.asked.load, limit, options.overlap)
            self.choice = self._within_budget(split, seconds_of)
            self.notes = (*self.notes, *(predictor.notes if predictor is not None else ()))
            form = _best(self.choice)
        return split, self._in_form(split, degree, form, options.overlap)

    def _in_form(self, split: Split | None, degree: int | None, form: FormChoice, overlap: str) -> LaneProgram:
        """The lane program in a form, or in the model's own."""
        captured = self.captured
        with self.show.stage("rewrite"):
            if split is None:
                assert captured.lanes is not None, "it has no split"
                program = lower_native(captured.program, captured.lanes, degree, overlap=overlap, runner=self.runner)
            else:
                program = lower_split(split, form, self.asked.options.layers, overlap=overlap, runner=self.runner)
        if program.no_cache and token_input(program) is not None:
            no_cache = f"no KV cache, generation recomputes the prefix for every token: {program.no_cache}"
            self.notes = (*self.notes, no_cache)
        if overlap == TOKENS and program.cached is None:
            self.notes = (*self.notes, "prefills are not read as two halves, which takes a KV cache")
        self.notes = (*self.notes, *no_halves(program))
        return program

    def _lane_choice(self) -> LaneChoice:
        """Within a budget every layer may take the form that hides all it sends and changes least."""
        options, budget = self.asked.options, self.asked.budget
        form = options.form if budget is None else DELAYED.name
        tokens = options.calibrate_tokens
        return LaneChoice(self.captured, form, options.layers, self.asked.texts, tokens, self.show)

    def _within_budget(self, split: Split, seconds_of: SecondsOf | None, which: str = "") -> Choice:
        assert self.asked.budget is not None, "there is something to keep to"
        options, budget = self.asked.options, self.asked.budget
        tokens, passes, costs = options.calibrate_tokens, options.calibrate_passes, self._costs_file(which)
        texts = self.asked.texts
        return forms_within(self.captured, split, texts, tokens, passes, budget, self.show, costs, seconds_of)

    def _costs_file(self, which: str = "") -> Path:
        """Where the costs of single layers are kept for the next search; they hold for one degree."""
        return Path(f"{self.asked.directory}.{which}sensitivity.json")

    def _latencies(self, split: Split | None, program: LaneProgram, machine: Machine) -> LatencyTable:
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
            most = next(iter(graphs.values())).longest(max_positions(self.captured.config))
            return latency_table(graphs, Predictor(machine), most=most)


def no_halves(program: LaneProgram) -> list[str]:
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
