"""What a model brings on a machine: predicted times of its forms and schedules, for several loads, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        notes: What is not in it, and why.
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
        asked = next((name for name in names if name not in ("standard", SILENT) and HALVES not in name), "standard")
        times = [
            [str(load.batch), str(load.prompt), *(_times(predictions[name]) for name in names)]
            for load, predictions in self.rows.items()
        ]
        parts = [
            [str(load.batch), str(load.prompt), *_parts(predictions[asked]), *_parts(predictions["standard"])]
            for load, predictions in self.rows.items()
        ]
        kinds = ("computes", "waits", "hides")
        return [
            f"predicted on {self.machine}, {self.degree} devices: time to the first token / per following token, ms",
            *table(["batch", "prompt", *names], times),
            "",
            "where the time to the first token goes, ms",
            *table(["batch", "prompt", *(f"{name} {kind}" for name in (asked, "standard") for kind in kinds)], parts),
            *self.notes,
        ]


def latency_table(
    standard: RunGraphs,
    asked: RunGraphs,
    name: str,
    predictor: Predictor,
    *,
    prompts: Sequence[int] = PROMPTS,
    batches: Sequence[int] = BATCHES,
    most: int | None = None,
) -> LatencyTable:
    """Predict a model's standard form and another one, with and without prefills in two halves.

    Args:
        standard: The model in standard form.
        asked: It in the form that was asked for, which may be the same.
        name: What that is called.
        predictor: Knows the machine.
        prompts, batches: The loads.
        most: The longest sequence that the model takes; None if nothing bounds it.

    Raises:
        UsageError: See `Predictor.predict`.
    """
    programs = {"standard": standard} if name == "standard" else {"standard": standard, name: asked}
    rows, left_out = {}, []
    for prompt in prompts:
        new_tokens = Load(prompt).new_tokens
        if most is not None and prompt + new_tokens > most:
            left_out.append(prompt)
            continue
        for batch in batches:
            load = Load(prompt, batch)
            predictions: dict[str, Prediction] = {}
            for form, program in programs.items():
                predictions[form] = predictor.predict(program, load)
                if program.split is not None:
                    predictions[f"{form}, {HALVES}"] = predictor.predict(program, load, halves=True)
            predictions[SILENT] = predictor.predict(standard, load, silent=True)
            rows[load] = predictions
    by_batch = dict(sorted(rows.items(), key=lambda item: (item[0].batch, item[0].prompt)))
    note = f"prompts of {', '.join(map(str, left_out))} tokens are left out: the model takes {most}"
    return LatencyTable(predictor.machine.name, standard.degree, by_batch, (note,) if left_out else ())


def compared_lines(tables: Sequence[LatencyTable]) -> list[str]:
    """Several degrees beside each other: the standard form, and the fastest of all that was predicted."""
    rows = []
    for load in tables[0].rows:
        cells = [str(load.batch), str(load.prompt)]
        for one in tables:
            predictions = {name: value for name, value in one.rows[load].items() if name != SILENT}
            best = min(predictions, key=lambda name: predictions[name].ttft)
            cells += [_times(predictions["standard"]), f"{_times(predictions[best])} {best}"]
        rows.append(cells)
    header = [f"{one.degree}: {what}" for one in tables for what in ("standard", "fastest")]
    return [
        f"predicted on {tables[0].machine}, by devices: time to the first token / per following token, ms",
        *table(["batch", "prompt", *header], rows),
        *dict.fromkeys(note for one in tables for note in one.notes),
    ]


def _times(prediction: Prediction) -> str:
    return f"{_ms(prediction.ttft)} / {_ms(prediction.tpot)}"


def _parts(prediction: Prediction) -> list[str]:
    prefill = prediction.prefill
    return [_ms(sum(prefill.spent.values())), _ms(prefill.waited), _ms(prefill.hidden)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
