"""Predicts the time to the first token and per following token of a lane program on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.cache import CUT, FIRST_SLOTS, PAST, PICKS, SECOND_PAST, SLOTS
from kraken_compiler.ir.program import CachedProgram, LaneProgram
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.sized import Sizer
from kraken_compiler.latency.timeline import Timeline, lay_out


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
    def total(self) -> float:
        """Seconds of all of it."""
        return self.ttft + (self.load.new_tokens - 1) * self.tpot


class Predictor:
    """Predicts programs on one machine; the shapes of operators are found once for all of them."""

    def __init__(self, machine: Machine, *, fused: bool = True) -> None:
        """Prepare.

        Args:
            machine: The machine.
            fused: Programs are compiled.
        """
        self.machine, self.fused = machine, fused
        self._sizer = Sizer()

    def predict(self, program: LaneProgram, load: Load, *, halves: bool = False, silent: bool = False) -> Prediction:
        """The times of a load.

        Args:
            program: A lane program with a KV cache.
            load: What it is asked for.
            halves: The prompt is read as two halves, each of which hides the other's sums.
            silent: Without any communication.

        Raises:
            UsageError: The program has no KV cache, or no graph on two halves, or the machine lacks figures.
        """
        cached = program.cached
        if cached is None:
            raise UsageError(f"times are predicted of programs with a KV cache only: {program.no_cache}")
        past = load.prompt + load.new_tokens // 2
        decode = self._run(cached, load.batch, 1, past, program.degree, halves=False, silent=silent)
        prefill = self._run(cached, load.batch, load.prompt, 0, program.degree, halves=halves, silent=silent)
        return Prediction(load, prefill, decode)

    def fastest(self, program: LaneProgram, load: Load) -> Prediction:
        """The times of a load with its prompt read at once or as two halves, as is faster. See `predict`."""
        at_once = self.predict(program, load)
        if program.cached is None or program.cached.split is None or load.prompt < 2:
            return at_once
        return min(at_once, self.predict(program, load, halves=True), key=lambda prediction: prediction.ttft)

    def _run(
        self, cached: CachedProgram, batch: int, tokens: int, past: int, ranks: int, *, halves: bool, silent: bool
    ) -> Timeline:
        slots = past + tokens
        inputs: dict[str, tuple[int, ...]] = {
            cached.step.inputs[0].name: (batch, tokens),
            SLOTS: (slots,),
            PAST: (past,),
            PICKS: (batch, 1),
            **{spec.key: (batch, spec.heads, slots, spec.key_dim) for spec in cached.plan.caches},
            **{spec.value: (batch, spec.heads, slots, spec.value_dim) for spec in cached.plan.caches},
        }
        graph: fx.Graph = cached.step.graph
        if halves:
            if cached.split is None:
                raise UsageError(f"the program does not run as two halves: {cached.no_split or 'nobody asked for it'}")
            graph, cut = cached.split.program.graph, tokens // 2
            inputs |= {CUT: (cut,), FIRST_SLOTS: (past + cut,), SECOND_PAST: (past + cut,)}
        sizes: Mapping[fx.Node, Any] = self._sizer.sizes(graph, inputs, slots)
        return lay_out(graph, sizes, self.machine, ranks, fused=self.fused, silent=silent)
