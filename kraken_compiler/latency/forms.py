"""Predicted times of one load on one degree of a model: for any forms of its layers, and what no forms can beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Self

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.ir.program import Split
from kraken_compiler.ir.schedule import AUTO
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.node_costs import ATTENTION, PRODUCT
from kraken_compiler.latency.predict import Load, Prediction, Predictor, RunGraphs
from kraken_compiler.latency.timeline import Timeline
from kraken_compiler.passes.lower import FormChoice, lower_split


@dataclass(frozen=True)
class LoadTimes:
    """Seconds that a load takes.

    Attributes:
        at_once: With its prompt read at once.
        halves: With its prompt read as two halves; None if it cannot be.
        bound: Less than it takes in any forms: its products and its attention, without communication.
    """

    at_once: float
    halves: float | None
    bound: float

    @property
    def fastest(self) -> float:
        """Seconds of the faster of the two."""
        return self.at_once if self.halves is None else min(self.at_once, self.halves)

    @property
    def in_halves(self) -> bool:
        """Whether two halves are faster."""
        return self.fastest < self.at_once

    @classmethod
    def of(
        cls, split: Split, predictor: Predictor, load: Load, form: FormChoice = STANDARD, limit: int | None = None
    ) -> Self:
        """The times of a split program in one choice of forms.

        Args:
            split: The program.
            predictor: Knows the machine.
            load: What it is asked for.
            form: The forms, as `lower` takes them.
            limit: The longest sequence that the model takes; None if only the program's caches bound it.

        Raises:
            UsageError: It has no KV cache, takes no sequence that long, or the machine lacks figures.
        """
        graphs = RunGraphs.of(lower_split(split, form, overlap=AUTO))
        require_fits(load, graphs.longest(limit))
        ways = [False, True] if graphs.split is not None and load.prompt > 1 else [False]
        times = [predictor.predict(graphs, load, halves=halves).total for halves in ways]
        silent = (predictor.predict(graphs, load, halves=halves, silent=True) for halves in ways)
        bound = min(_bound(one, predictor.machine) for one in silent)
        return cls(times[0], times[1] if len(times) > 1 else None, bound)


def seconds_of_forms(
    split: Split, predictor: Predictor, load: Load, limit: int | None = None, overlap: str = AUTO
) -> Callable[[tuple[str, ...]], float]:
    """The function that predicts a load for forms of the layers, with the prompt read as is faster.

    Args:
        split: The program.
        predictor: Knows the machine.
        load: What it is asked for.
        limit: The longest sequence that the model takes; None if only the program's caches bound it.
        overlap: How the program overlaps, as `lower` takes it.

    Raises:
        UsageError: It has no KV cache or takes no sequence that long; at once, before a search for forms begins.
    """
    require_fits(load, RunGraphs.of(lower_split(split, STANDARD, overlap=overlap)).longest(limit))

    @cache
    def seconds(forms: tuple[str, ...]) -> float:
        return predictor.fastest(RunGraphs.of(lower_split(split, forms, overlap=overlap)), load).total

    return seconds


def _bound(silent: Prediction, machine: Machine) -> float:
    # Forms differ in what they add to the stream and where: every one has the same products and attentions.
    prefill, decode = (_unavoidable(one, machine) for one in (silent.prefill, silent.decode))
    return prefill + (silent.load.new_tokens - 1) * decode


def _unavoidable(one: Timeline, machine: Machine) -> float:
    kernels = [event for event in one.events if event.kind in (PRODUCT, ATTENTION)]
    launches = len(kernels) * machine.launch.compiled + machine.launch.step
    return sum(event.end - event.begin for event in kernels) + launches


def require_fits(load: Load, most: int | None) -> None:
    """Make sure that a model takes a load's sequences, of at most so many tokens.

    Raises:
        UsageError: It does not.
    """
    if most is not None and load.prompt + load.new_tokens > most:
        raise UsageError(
            f"--prompt {load.prompt} and --new-tokens {load.new_tokens}: the model takes sequences of {most} tokens; "
            "describe a shorter load"
        )
