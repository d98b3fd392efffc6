"""Predicts the time to the first token and per following token of a lane program on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.cache import CUT, FIRST_SLOTS, PAST, PICKS, POSITIONS, SECOND_PAST, SLOTS, CachePlan
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.sized import Sized, Sizer
from kraken_compiler.latency.timeline import Timeline, lay_out
from kraken_compiler.passes.graph_tools import args_of


@dataclass(frozen=True)
class Load:
    """What a program is asked for.

    Attributes:
        prompt: Tokens of a prompt.
        batch: Prompts at once.
        new_tokens: Tokens that are generated behind each.
    """

    prompt: int
    batch: int = 1
    new_tokens: int = 256


@dataclass(frozen=True)
class Prediction:
    """What a load takes.

    Attributes:
        load: The load.
        prefill: The prompt's run: its seconds are the time to the first token.
        decode: A run of one new token, halfway through the generation: its seconds are those of every following token.
    """

    load: Load
    prefill: Timeline
    decode: Timeline

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.prefill.seconds

    @property
    def tpot(self) -> float:
        """Seconds of each following token."""
        return self.decode.seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain values; seconds."""
        runs = {"prefill": self.prefill.to_dict(), "decode": self.decode.to_dict()}
        return {"ttft": self.ttft, "tpot": self.tpot, **runs}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of these times."""
        return tuple(dict.fromkeys((*self.prefill.notes, *self.decode.notes)))

    @property
    def total(self) -> float:
        """Seconds of all of it."""
        return self.ttft + (self.load.new_tokens - 1) * self.tpot


@dataclass(frozen=True)
class RunGraphs:
    """The graphs that runtimes execute, from a program in memory or from the files of an artifact.

    Attributes:
        step: Prefill and decode in one.
        split: The same on two halves of the tokens; None if there is none.
        tables: What is computed once for a capacity; None if nothing is.
        weights: By name, all that the graphs are given of the model.
        ids: Name of the token ids.
        plan: The caches and tables.
        degree: Number of lanes.
    """

    step: fx.Graph
    split: fx.Graph | None
    tables: fx.Graph | None
    weights: Mapping[str, WeightSpec]
    ids: str
    plan: CachePlan
    degree: int

    def longest(self, limit: int | None) -> int | None:
        """The longest sequence that caches and a limit of the model's own allow; None if nothing bounds it."""
        return min((one for one in (limit, self.plan.limit) if one is not None), default=None)

    @classmethod
    def of(cls, program: LaneProgram) -> Self:
        """Those of a program in memory.

        Raises:
            UsageError: It has no KV cache.
        """
        cached = program.cached
        if cached is None:
            raise UsageError(f"times are predicted of programs with a KV cache only: {program.no_cache}")
        return cls(
            step=cached.step.graph,
            split=cached.split.program.graph if cached.split is not None else None,
            tables=cached.tables.graph if cached.plan.tables else None,
            weights=program.weights | cached.step.weights,
            ids=cached.step.inputs[0].name,
            plan=cached.plan,
            degree=program.degree,
        )

    def placeholders(self, sizer: Sizer, batch: int, tokens: int, past: int) -> dict[str, Sized]:
        """What the step graph and the one on two halves are given for so many tokens behind a past."""
        slots, cut = past + tokens, tokens // 2
        weights = {name: Sized(tuple(spec.shape), getattr(torch, spec.dtype)) for name, spec in self.weights.items()}
        counts = {SLOTS: slots, PAST: past, CUT: cut, FIRST_SLOTS: past + cut, SECOND_PAST: past + cut}
        return {
            **weights,
            self.ids: Sized((batch, tokens), torch.int64),
            POSITIONS: Sized((batch, tokens), torch.int64),
            PICKS: Sized((batch, 1), torch.int64),
            **{name: Sized((count,), torch.int64) for name, count in counts.items()},
            **self._caches(batch, slots),
            **self._tables(sizer, weights, slots),
        }

    def _caches(self, batch: int, slots: int) -> dict[str, Sized]:
        caches = {}
        for spec in self.plan.caches:
            for name, width in ((spec.key, spec.key_dim), (spec.value, spec.value_dim)):
                caches[name] = Sized((batch, spec.heads, slots, width), getattr(torch, spec.dtype))
        return caches

    def _tables(self, sizer: Sizer, weights: Mapping[str, Sized], capacity: int) -> dict[str, Sized]:
        if self.tables is None:
            return {}
        ids = {self.ids: Sized((1, capacity), torch.int64)}
        sizes = sizer.sizes(self.tables, {**weights, **ids})
        (results,) = args_of(self.tables.output_node())
        return {name: sizes[result] for name, result in zip(self.plan.tables, results, strict=True)}


class Predictor:
    """Predicts programs on one machine; the shapes of operators are found once for all of them.

    Attributes:
        machine: The machine.
        fused, recorded: See `__init__`.
        notes: What has been estimated so far because the machine lacks figures, a line each.
    """

    def __init__(self, machine: Machine, *, fused: bool = True, recorded: bool | None = None) -> None:
        """Prepare.

        Args:
            machine: The machine.
            fused: Programs are compiled.
            recorded: Their kernels run as one, as in a CUDA graph; None means where they are compiled.
        """
        self.machine, self.fused = machine, fused
        self.recorded = fused if recorded is None else recorded
        self.notes: tuple[str, ...] = ()
        self._sizer = Sizer()

    def predict(self, graphs: RunGraphs, load: Load, *, halves: bool = False, silent: bool = False) -> Prediction:
        """The times of a load.

        Args:
            graphs: What runs.
            load: What it is asked for.
            halves: The prompt is read as two halves, each of which hides the other's sums.
            silent: Without any communication.

        Raises:
            UsageError: There is no graph on two halves, or the machine lacks figures.
        """
        past = load.prompt + load.new_tokens // 2
        decode = self._run(graphs, load.batch, 1, past, halves=False, silent=silent)
        prefill = self._run(graphs, load.batch, load.prompt, 0, halves=halves, silent=silent)
        prediction = Prediction(load, prefill, decode)
        self.notes = tuple(dict.fromkeys((*self.notes, *prediction.notes)))
        return prediction

    def fastest(self, graphs: RunGraphs, load: Load) -> Prediction:
        """The times of a load with its prompt read at once or as two halves, as is faster. See `predict`."""
        at_once = self.predict(graphs, load)
        if graphs.split is None or load.prompt < 2:
            return at_once
        return min(at_once, self.predict(graphs, load, halves=True), key=lambda prediction: prediction.ttft)

    def _run(self, graphs: RunGraphs, batch: int, tokens: int, past: int, *, halves: bool, silent: bool) -> Timeline:
        placeholders = graphs.placeholders(self._sizer, batch, tokens, past)
        graph = graphs.step
        if halves:
            if graphs.split is None:
                raise UsageError("the program does not run as two halves")
            graph = graphs.split
        sizes = self._sizer.sizes(graph, placeholders)
        return lay_out(
            graph, sizes, self.machine, graphs.degree, fused=self.fused, recorded=self.recorded, silent=silent
        )
