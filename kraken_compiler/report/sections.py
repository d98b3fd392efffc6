"""The sections of an artifact's page, each from what is known of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.ir.forms import STANDARD
from kraken_compiler.latency.predict import Prediction
from kraken_compiler.latency.table import LatencyTable, milliseconds, times_text
from kraken_compiler.latency.timeline import STREAMS, Timeline
from kraken_compiler.ranks.trace import COMPUTE, LINK, PREFILL, RUN, STEP, Span
from kraken_compiler.report.draw import COLORS, Bar, Point, frontier, timeline
from kraken_compiler.report.page import Picture, Section
from kraken_compiler.text import number_text

_PREDICTED_KEY = [
    (name, COLORS[kind])
    for name, kind in (
        ("products", "products"),
        ("attention", "attention"),
        ("what only moves numbers", "others"),
        ("launches", "launch"),
        ("takes part in a sum", "busy"),
        ("waits", "wait"),
        ("a sum on the link", "reduce"),
    )
]
_MEASURED_KEY = [
    (name, COLORS[kind])
    for name, kind in (
        ("computes", "compute"),
        ("begins a sum", "busy"),
        ("waits", "wait"),
        ("a sum, from its start to the end of its wait", "reduce"),
    )
]
_ZOOM = 0.12
"""Of a run, the part in its middle that is drawn larger."""


def model_section(manifest: Manifest, report: Mapping[str, Any]) -> Section:
    """What was compiled, and of what."""
    source = manifest.source
    facts = [
        ("source", f"{source.name} ({source.model_class or source.kind})"),
        ("devices", str(manifest.degree)),
        ("forms", _counted(manifest.forms)),
        ("backends", ", ".join(manifest.backends)),
        ("function", "the source's" if report.get("exact") else "changed"),
        ("parameters of a lane", ", ".join(dict.fromkeys(f"{one['parameters']:,}" for one in report.get("lanes", ())))),
        ("element type", manifest.dtype),
        ("compiled with", f"kraken-compiler {manifest.kraken_compiler}, torch {manifest.torch}"),
    ]
    return Section("Model", tuple(report.get("notes", ())), ("", ""), facts)


def quality_section(report: Mapping[str, Any]) -> Section | None:
    """What the forms cost, before and after calibration, as the compile measured it."""
    rows = []
    for one in (report.get("calibration") or {}).get("quality", ()):
        before, after = one["before"], one["after"]
        name = str(after["text"])
        rows += [(f"{name}, before calibration", *_quality(before)), (name, *_quality(after))]
    quality = (report.get("verification") or {}).get("quality")
    if quality:
        rows.append((str(quality["text"]), *_quality(quality)))
    if not rows:
        return None
    return Section("Quality", (), ("text", "KL", "same top token", "perplexity", "source's", "tokens"), rows)


def layers_section(manifest: Manifest, report: Mapping[str, Any], costs: Mapping[tuple[str, int], float]) -> Section:
    """Layer by layer its form, its sums and what they hide behind, and what the form costs there alone."""
    windows = {window.reduce: len(window.gemms) for window in manifest.windows}
    branch_layers = [branch.layer for branch in manifest.layers.branches]
    rows = []
    for layer, form in enumerate(manifest.forms):
        reduces = [
            reduce
            for reduce in manifest.plan.reduces
            if not reduce.is_lookup and branch_layers[reduce.last - 1] == layer
        ]
        cost = costs.get((form, layer))
        rows.append(
            (
                str(layer),
                form,
                str(len(reduces)),
                f"{sum(reduce.bytes_per_token for reduce in reduces):,}",
                ", ".join(str(windows.get(reduce.index, 0)) for reduce in reduces),
                "" if cost is None else number_text(cost, ".3g"),
            )
        )
    texts = () if costs else ("What a form costs in a layer alone is not known: kraken-verify --by-layer measures it.",)
    header = ("layer", "form", "sums", "bytes/token", "products in the window of each", "KL, changed there alone")
    return Section("Layers", texts, header, rows)


def times_section(found: LatencyTable) -> Section:
    """Predicted times of several loads."""
    names = list(next(iter(found.rows.values())))
    rows = [
        (
            str(load.batch),
            str(load.prompt),
            *(times_text(one[name]) for name in names),
        )
        for load, one in found.rows.items()
    ]
    text = f"On {found.machine}, {found.degree} devices: time to the first token / per following token, ms."
    return Section("Predicted times", (text, *found.notes), ("batch", "prompt", *names), rows)


def timeline_section(prediction: Prediction, runs: Sequence[Sequence[Span]]) -> Section:
    """Where the time of a prefill and of a decode step goes: as predicted, and as rank 0 ran them."""
    load = prediction.load
    pictures = []
    for name, one, run in (
        (f"a prefill of {load.prompt} tokens", prediction.prefill, PREFILL),
        ("a decode step", prediction.decode, STEP),
    ):
        pictures += _predicted(name, one)
        measured = sorted((spans for spans in runs if _run(spans).name == run), key=lambda spans: _run(spans).end)
        if measured:
            # First runs are slower than what follows.
            several = f", the median of {len(measured)}" if len(measured) > 1 else ""
            pictures += _measured(f"{name}, measured on rank 0{several}", measured[len(measured) // 2])
    compiled = "Predicted are programs that are compiled, as with kraken-run --compile."
    return Section("Where the time goes", (compiled,), pictures=pictures)


def frontier_section(choice: Mapping[str, Any]) -> Section:
    """The choices of forms that a search has measured."""
    timed = choice.get("standard_seconds") is not None
    best = (choice.get("best") or {}).get("forms")
    standard = choice["standard_seconds"] * 1e3 if timed else 0.0
    points = [Point(standard, 0.0, STANDARD.name, best is None)]
    points += [
        Point(
            one["seconds"] * 1e3 if timed else one["spared"] * 100,
            one["kl"],
            _counted(one["forms"]),
            one["forms"] == best,
        )
        for one in choice["frontier"]
        if one["kl"] is not None  # beyond all numbers
    ]
    x = "predicted ms of the load" if timed else "% of standard's bytes not waited for"
    rows = [(point.label, f"{point.y:.3g}", f"{point.x:.4g}", "chosen" if point.chosen else "") for point in points]
    picture = Picture.of("KL to the source against what is saved; red: chosen", frontier(points, x, "KL"))
    return Section("Choice of forms", (f"Budget: {choice['budget']}.",), ("forms", "KL", x, ""), rows, (picture,))


def runs_of(spans: Sequence[Span]) -> list[list[Span]]:
    """A rank's record cut into its runs, each with the times from its beginning."""
    found = []
    for run in (span for span in spans if span.stream == RUN):
        inside = [one for one in spans if one.begin >= run.begin and one.end <= run.end]
        found.append([Span(one.name, one.stream, one.begin - run.begin, one.end - run.begin) for one in inside])
    return found


def _predicted(name: str, one: Timeline) -> list[Picture]:
    bars = [Bar(event.stream, event.kind, event.name, event.begin, event.end) for event in one.events]
    waits = f"of which {milliseconds(one.waited)} ms waiting; {milliseconds(one.hidden)} ms of sums are hidden"
    title = f"{name}, predicted: {milliseconds(one.seconds)} ms, {waits}"
    return _pictures(title, bars, STREAMS, one.seconds, _PREDICTED_KEY)


def _measured(name: str, spans: Sequence[Span]) -> list[Picture]:
    kinds = {"start": "busy", "wait": "wait", "gather": "wait"}
    bars = [
        Bar(
            span.stream,
            "reduce" if span.stream == LINK else kinds.get(span.name.partition(" ")[0], "compute"),
            span.name,
            span.begin,
            span.end,
        )
        for span in spans
        if span.stream in (COMPUTE, LINK)
    ]
    seconds = _run(spans).end
    waits = sum(bar.end - bar.begin for bar in bars if bar.kind == "wait")
    title = f"{name}: {milliseconds(seconds)} ms, of which {milliseconds(waits)} ms in waits"
    return _pictures(title, bars, (COMPUTE, LINK), seconds, _MEASURED_KEY)


def _run(spans: Sequence[Span]) -> Span:
    """The whole of a run, in its record."""
    (run,) = (span for span in spans if span.stream == RUN)
    return run


def _pictures(
    title: str, bars: Sequence[Bar], streams: Sequence[str], seconds: float, key: Sequence[tuple[str, str]]
) -> list[Picture]:
    bars = sorted(bars, key=lambda bar: bar.begin)
    middle = (seconds * (0.5 - _ZOOM / 2), seconds * (0.5 + _ZOOM / 2))
    return [
        Picture.of(title, timeline(bars, streams, 0.0, seconds), key),
        Picture.of("the middle of it", timeline(bars, streams, *middle)),
    ]


def _quality(one: Mapping[str, Any]) -> tuple[str, ...]:
    specs = {"kl": ".3g", "top1_agreement": ".1%", "perplexity": ".4g", "source_perplexity": ".4g"}
    # JSON has null where there is no number.
    numbers = (number_text(math.nan if one[name] is None else one[name], spec) for name, spec in specs.items())
    return (*numbers, f"{one['tokens']:,}")


def _counted(forms: Sequence[str]) -> str:
    return ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
