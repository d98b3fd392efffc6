"""What a model brings on a machine: predicted times of its forms and schedules, for several loads, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.latency.predict import Load, Prediction, Predictor, RunGraphs
from kraken_compiler.text import table

PROMPTS, BATCHES = (128, 512, 2048, 8192), (1, 8, 32)
HALVES, SILENT = "two halves", "no communication"


@dataclass(frozen=True)
class LatencyTable:
    """Predictions for one degree of a model.

    Attributes:
        machine: Its name.
        degree: How many devices there are.
        rows: By load, a prediction by what runs: a form, one with prefills in two halves, or without communication.
        notes: What is not in it, and why; which figures others stand in for.
    """

    machine: str
    degree: int
    rows: Mapping[Load, Mapping[str, Prediction]]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values; seconds."""
        return {
            "machine": self.machine,
            "degree": self.degree,
            "notes": list(self.notes),
            "loads": [
                {
                    "prompt": load.prompt,
                    "batch": load.batch,
                    "new_tokens": load.new_tokens,
                    "predictions": {name: prediction.to_dict() for name, prediction in predictions.items()},
                }
                for load, predictions in self.rows.items()
            ],
        }

    def lines(self) -> list[str]:
        """Two tables for people: what everything takes, and where the time of the changed form goes."""
        names = list(next(iter(self.rows.values())))
        reference = _reference(names)
        asked = next((name for name in names if name not in (reference, SILENT) and HALVES not in name), reference)
        shown = tuple(dict.fromkeys((asked, reference)))
        times = [
            [str(load.batch), str(load.prompt), *(times_text(predictions[name]) for name in names)]
            for load, predictions in self.rows.items()
        ]
        parts = [
            [str(load.batch), str(load.prompt), *(part for name in shown for part in _parts(predictions[name]))]
            for load, predictions in self.rows.items()
        ]
        kinds = ("computes", "waits", "hides")
        return [
            f"predicted on {self.machine}, {self.degree} devices: time to the first token / per following token, ms",
            *table(["batch", "prompt", *names], times),
            "",
            "where the time to the first token goes, ms",
            *table(["batch", "prompt", *(f"{name} {kind}" for name in shown for kind in kinds)], parts),
            *self.notes,
        ]


def latency_table(
    programs: Mapping[str, RunGraphs],
    predictor: Predictor,
    *,
    prompts: Sequence[int] = PROMPTS,
    batches: Sequence[int] = BATCHES,
    most: int | None = None,
) -> LatencyTable:
    """Predict programs of one degree, with and without prefills in two halves.

    Args:
        programs: By what they are called; the first without communication is what nothing can beat.
        predictor: Knows the machine.
        prompts, batches: The loads.
        most: The longest sequence that the model takes; None if nothing bounds it.

    Raises:
        UsageError: See `Predictor.predict`.
    """
    first = next(iter(programs.values()))
    loads = [Load(prompt, batch) for batch in batches for prompt in prompts]
    fitting = [load for load in loads if most is None or load.prompt + load.new_tokens <= most]
    if not fitting and most is not None:
        # A model of short sequences: half for the prompt.
        fitting = [Load(max(1, most // 2), batch, max(1, most // 2)) for batch in batches]
    rows: dict[Load, dict[str, Prediction]] = {}
    for load in fitting:
        rows[load] = predictions = {}
        for name, program in programs.items():
            predictions[name] = predictor.predict(program, load)
            if program.split is not None and load.prompt > 1:
                predictions[f"{name}, {HALVES}"] = predictor.predict(program, load, halves=True)
        predictions[SILENT] = predictor.predict(first, load, silent=True)
    left_out = dict.fromkeys(load.prompt for load in loads if load not in rows)
    note = f"prompts of {', '.join(map(str, left_out))} tokens are left out: the model takes {most}"
    notes = (*((note,) if left_out else ()), *predictor.notes)
    return LatencyTable(predictor.machine.name, first.degree, rows, notes)


def compared_lines(tables: Sequence[LatencyTable]) -> list[str]:
    """Several degrees beside each other: the standard form, and the fastest of all that was predicted."""
    rows = []
    for load in tables[0].rows:
        cells = [str(load.batch), str(load.prompt)]
        for one in tables:
            predictions = {name: value for name, value in one.rows[load].items() if name != SILENT}
            best = min(predictions, key=lambda name: predictions[name].ttft)
            cells += [times_text(predictions[_reference(list(predictions))]), f"{times_text(predictions[best])} {best}"]
        rows.append(cells)
    reference = _reference(list(next(iter(tables[0].rows.values()))))
    header = [f"{one.degree}: {what}" for one in tables for what in (reference, "fastest")]
    return [
        f"predicted on {tables[0].machine}, by devices: time to the first token / per following token, ms",
        *table(["batch", "prompt", *header], rows),
        *dict.fromkeys(note for one in tables for note in one.notes),
    ]


def _reference(names: Sequence[str]) -> str:
    """What others are compared with: a model that has lanes of its own has no standard form."""
    return STANDARD.name if STANDARD.name in names else names[0]


def times_text(prediction: Prediction) -> str:
    """Time to the first token and per following token, in ms."""
    return f"{milliseconds(prediction.ttft)} / {milliseconds(prediction.tpot)}"


def _parts(prediction: Prediction) -> list[str]:
    prefill = prediction.prefill
    return [milliseconds(sum(prefill.spent.values())), milliseconds(prefill.waited), milliseconds(prefill.hidden)]


def milliseconds(seconds: float) -> str:
    """A time in ms, as text."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
