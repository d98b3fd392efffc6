"""Picks the degree, the overlap and the forms of a compile: those of the least predicted time on a machine.

Without a budget the forms are `standard`. Within one every degree could be searched, which takes its time: a degree is
searched only while a bound of its time, below what any forms of its layers take, is below the best time so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kraken_compiler.errors import UnsupportedModelError, UsageError
from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import Recognized, Split
from kraken_compiler.ir.schedule import AUTO, NO_OVERLAP, TOKENS
from kraken_compiler.latency.forms import LoadTimes, seconds_of_forms
from kraken_compiler.latency.predict import Load, Predictor
from kraken_compiler.passes.lower import find_degree
from kraken_compiler.passes.manager import PassRecord, PassRunner
from kraken_compiler.passes.shard.degrees import valid_degrees
from kraken_compiler.passes.stages import Assign, cut, plan
from kraken_compiler.progress import Progress
from kraken_compiler.quality.budget import Candidate, Choice, SecondsOf
from kraken_compiler.text import table

Search = Callable[[Split, SecondsOf], Choice]
"""Searches the forms of a split program within a budget, and for the least of these times."""


@dataclass(frozen=True)
class DegreeTimes:
    """What is known of one degree.

    Attributes:
        degree: The number of lanes.
        standard: The times of the load in standard form.
        choice: What a search within the budget found; None if it was not searched.
    """

    degree: int
    standard: LoadTimes
    choice: Choice | None = None

    @property
    def best(self) -> Candidate | None:
        """The fastest forms within the budget, where they are faster than the standard one."""
        best = self.choice.best if self.choice is not None else None
        return best if best is not None and _seconds(best) < self.standard.fastest else None

    @property
    def seconds(self) -> float:
        """The least time that is known of it."""
        return self.standard.fastest if self.best is None else _seconds(self.best)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; seconds."""
        return {
            "degree": self.degree,
            "seconds": self.seconds,
            "standard": self.standard.at_once,
            "standard_halves": self.standard.halves,
            "bound": self.standard.bound,
            "choice": self.choice.to_dict() if self.choice is not None else None,
        }


@dataclass(frozen=True)
class AutoChoice:
    """What `--auto` has picked.

    Attributes:
        machine: Its name.
        load: The load.
        degree: The number of lanes.
        forms: The form of every layer.
        in_halves: Prompts are read as two halves.
        within_budget: Forms were searched within a budget.
        degrees: What is known of all degrees, ascending.
        left_out: Why others cannot be had, by degree.
    """

    machine: str
    load: Load
    degree: int
    forms: tuple[str, ...]
    in_halves: bool
    within_budget: bool
    degrees: tuple[DegreeTimes, ...]
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def of_degree(self) -> DegreeTimes:
        """What is known of the degree."""
        return next(one for one in self.degrees if one.degree == self.degree)

    @property
    def choice(self) -> Choice | None:
        """What the degree's search found, without a best where the standard form is taken; None if there was none."""
        one = self.of_degree
        return one.choice if one.choice is None or one.best is not None else replace(one.choice, best=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; seconds."""
        return {
            "machine": self.machine,
            "load": {"prompt": self.load.prompt, "batch": self.load.batch, "new_tokens": self.load.new_tokens},
            "degree": self.degree,
            "forms": list(self.forms),
            "overlap": TOKENS if self.in_halves else NO_OVERLAP,
            "degrees": [one.to_dict() for one in self.degrees],
            "left_out": {str(degree): reason for degree, reason in self.left_out.items()},
        }

    def lines(self) -> list[str]:
        """The choice in one line; within a budget also what is known of every degree; and what was left out."""
        halves = "prompts in two halves" if self.in_halves else "prompts at once"
        changed = sum(form != STANDARD.name for form in self.forms)
        forms = f"{changed} layers changed" if changed else STANDARD.name
        times = ", ".join(f"{one.degree}: {_ms(one.seconds)}" for one in self.degrees)
        load = f"{self.load.prompt} + {self.load.new_tokens} tokens on {self.machine}"
        first = f"picked      degree {self.degree}, {forms}, {halves}; predicted ms for {load}, by degree: {times}"
        left_out = [f"left out    degree {degree}: {reason}" for degree, reason in self.left_out.items()]
        return [first, *(self._table() if self.within_budget else ()), *left_out]

    def _table(self) -> list[str]:
        header = ("degree", "standard, ms", "at least", "within the budget", "")
        return table(header, map(self._row, self.degrees))

    def _row(self, one: DegreeTimes) -> tuple[str, ...]:
        best = one.choice.best if one.choice is not None else None
        found = "nothing" if one.choice is not None else ""
        state = "picked" if one.degree == self.degree else "" if one.choice else "not searched: it cannot be faster"
        within = found if best is None else _ms(_seconds(best))
        return str(one.degree), _ms(one.standard.fastest), _ms(one.standard.bound), within, state


@dataclass(frozen=True)
class Pick:
    """What a compile goes on with.

    Attributes:
        auto: What was picked, and of what.
        split: The program, split over the lanes.
        history: The records of the passes that split it.
    """

    auto: AutoChoice
    split: Split
    history: tuple[PassRecord, ...]


@dataclass
class _Planned:
    """One degree of the model: its shares are found, and it is cut in the order of the files."""

    times: DegreeTimes
    planned: Split
    split: Split
    runner: PassRunner


@dataclass(frozen=True, kw_only=True)
class Picker:
    """Picks among the degrees of one model.

    Attributes:
        predictor: Knows the machine.
        load: What the model is asked for.
        embedding: See `lower`.
        limit: The longest sequence that the model takes, by its config.
        dumps: Where the graphs of every degree go, in a folder of its own.
        show: Is told how far it is.
    """

    predictor: Predictor
    load: Load
    embedding: str = AUTO
    limit: int | None = None
    dumps: Path | None = None
    show: Progress

    def pick(
        self,
        recognized: Recognized,
        degrees: Sequence[int],
        history: Sequence[PassRecord],
        assign: Assign | None = None,
        search: Search | None = None,
    ) -> Pick:
        """Pick.

        Args:
            recognized: The recognised model.
            degrees: Those to choose from; empty means all valid ones that the machine knows.
            history: The records of the passes that recognised it.
            assign: Chooses heads and columns for the lanes, see `lower`; asked only for degrees that are searched.
            search: Searches forms within a budget; None keeps the standard form.

        Raises:
            UsageError: A degree is not valid, the machine does not know it, or no degree is both.
            UnsupportedModelError: No degree can be had, or one that was asked for cannot.
        """
        found: dict[int, _Planned] = {}
        left_out: dict[int, str] = {}
        wanted = self._degrees(recognized, degrees)
        for degree in wanted:
            try:
                found[degree] = self._planned(recognized, degree, history)
            except UnsupportedModelError as error:
                # Nobody has named it; unless it was the last, there are others.
                if degrees or (degree == wanted[-1] and not found):
                    raise
                left_out[degree] = error.rejections[0].reason
        if search is not None:
            for one in self._worth_a_search(list(found.values())):
                if assign is not None:
                    one.split = cut(one.planned, assign(one.planned), one.runner, embedding=self.embedding)
                choice = search(one.split, seconds_of_forms(one.split, self.predictor, self.load, self.limit))
                one.times = replace(one.times, choice=choice)
        best = min(found.values(), key=lambda one: one.times.seconds)
        return Pick(self._choice(best, found, left_out, search is not None), best.split, tuple(best.runner.history))

    def _degrees(self, recognized: Recognized, degrees: Sequence[int]) -> list[int]:
        machine = self.predictor.machine
        if degrees:
            for degree in degrees:
                machine.reduces(find_degree(degree, recognized.layers))
            return sorted(set(degrees))
        valid, known = valid_degrees(recognized.layers), sorted(table.ranks for table in machine.all_reduce)
        both = [degree for degree in known if degree in valid]
        if not both:
            raise UsageError(
                f"machine '{machine.name}' has all-reduces for {', '.join(map(str, known)) or 'no'} ranks, and the "
                f"model can be divided among 1 to {valid[-1]} lanes: there is no degree to pick"
            )
        return both

    def _planned(self, recognized: Recognized, degree: int, history: Sequence[PassRecord]) -> _Planned:
        dumps = self.dumps / f"degree-{degree}" if self.dumps is not None else None
        runner = PassRunner(dumps, history=list(history))
        with self.show.stage(f"split, degree {degree}"):
            planned = plan(recognized, degree, runner)
            split = cut(planned, {}, runner, embedding=self.embedding)
        with self.show.stage(f"predict, degree {degree}"):
            times = LoadTimes.of(split, self.predictor, self.load, limit=self.limit)
        return _Planned(DegreeTimes(degree, times), planned, split, runner)

    def _worth_a_search(self, planned: list[_Planned]) -> Iterator[_Planned]:
        """Degrees that may be faster than the best so far, as long as that is so: the lowest bound first."""
        for one in sorted(planned, key=lambda one: one.times.standard.bound):
            if one.times.standard.bound < min(other.times.seconds for other in planned):
                yield one

    def _choice(
        self, best: _Planned, found: dict[int, _Planned], left_out: dict[int, str], within_budget: bool
    ) -> AutoChoice:
        times = best.times
        forms = times.best.forms if times.best is not None else (STANDARD.name,) * len(best.split.layers.layers)
        chosen = times.standard
        if times.best is not None:
            chosen = LoadTimes.of(best.split, self.predictor, self.load, forms)
        degrees = tuple(found[degree].times for degree in sorted(found))
        machine, load = self.predictor.machine.name, self.load
        return AutoChoice(machine, load, times.degree, forms, chosen.in_halves, within_budget, degrees, left_out)


def _seconds(candidate: Candidate) -> float:
    assert candidate.seconds is not None, "it was searched for on a machine"
    return candidate.seconds


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
