"""The results as text: tables of medians, then ratios with what was aimed at and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ttft_parts.contenders import BOUND, MEANING
from ttft_parts.load import BUSY
from ttft_parts.ratios import (
    AIMS,
    METRICS,
    Aim,
    Place,
    Ratio,
    best_modes,
    hidden,
    medians,
    of_families,
    paired,
    place_of,
    ratios,
    windows,
)

_TITLE = {"ttft": "TTFT, time to the first token", "tpot": "TPOT, time per following token"}


def text(document: Mapping[str, Any], aims: Sequence[Aim] = AIMS) -> str:
    """The whole report."""
    lines = [f"{document['machine']['cpu']}, {document['machine']['cores']} cores; {_pairs(document['versions'])}"]
    for workload in document["workloads"]:
        lines += ["", *_workload(workload, aims)]
    return "\n".join(lines)


def summary(workload: Mapping[str, Any], aims: Sequence[Aim] = AIMS) -> dict[str, Any]:
    """The derived figures of a workload as plain values, for the JSON file."""
    return {
        "medians_s": [
            {"metric": metric, **_place(place), "contender": name, "seconds": value}
            for metric in METRICS
            for (place, name), value in medians(workload["cells"], metric).items()
        ],
        "modes": [
            {"metric": metric, "dtype": dtype, "family": family, "mode": mode}
            for metric in METRICS
            for (dtype, family), mode in best_modes(workload["cells"], metric).items()
        ],
        "windows": [
            {**_place(place), **asdict(found), "fits": found.fits} for place, found in windows(workload).items()
        ],
        "hidden": [
            {
                "metric": one.metric,
                "family": one.family,
                "together": one.together,
                "cells": [{**_place(place), "share": share} for place, share in one.shares.items()],
            }
            for one in hidden(workload)
        ],
        "ratios": [
            {**asdict(ratio.aim), **asdict(ratio), "low_at": _place(ratio.low_at), "high_at": _place(ratio.high_at)}
            for ratio in ratios(workload, aims)
        ],
    }


def _workload(workload: Mapping[str, Any], aims: Sequence[Aim]) -> list[str]:
    shape = workload["shape"]
    where = workload["network"]
    ranks = "one core each" if workload["pinned"] else "MORE RANKS THAN CORES, not pinned"
    hosts = f"{workload['degree']} network namespaces" if where["kind"] == "namespaces" else where["note"]
    lines = [
        f"== {workload['name']}: {shape['layers']} layers x {shape['width']}, {shape['parameters'] / 1e6:.0f} M "
        f"parameters, degree {workload['degree']}, {workload['new_tokens']} new tokens",
        f"   {workload['degree']} ranks, {ranks}; {hosts}",
        "",
        *_links(workload["links"], workload.get("moved_by", "gloo")),
    ]
    lines += [_not_timed(check) for check in workload["checks"] if check["right"] is False]
    lines += [f"problem: {problem.splitlines()[0]}" for problem in workload["problems"]]
    lines += _checked(workload["checks"])
    lines += _disturbed(workload["cells"])
    for metric in METRICS:
        lines += _medians(workload, metric)
    lines += _windows(workload)
    lines += _hidden(workload)
    lines += _kernel(workload["cells"])
    lines += _ratios(ratios(workload, aims), workload)
    lines += ["", *(f"{family}: {MEANING[family]}" for family in _families(workload))]
    return lines


def _links(links: Mapping[str, Mapping[str, Any]], moved_by: str) -> list[str]:
    lines = []
    for dtype, found in links.items():
        header = (
            "link",
            "reached",
            *(f"all-reduce of {_kib(size)}" for size in next(iter(found.values()))["all_reduce"]),
        )
        rows = [
            (_link(link), f"{one['gbits']:.2f} Gbit/s", *(f"{_ms(value)} ms" for value in one["all_reduce"].values()))
            for link, one in found.items()
        ]
        lines += [f"links as seen through {moved_by}, {dtype}", *table(header, rows), ""]
    return lines


def _medians(workload: Mapping[str, Any], metric: str) -> list[str]:
    found = medians(workload["cells"], metric)
    modes = best_modes(workload["cells"], metric)
    lines = []
    for dtype in dict.fromkeys(place[0] for place, _ in found):
        places = list(dict.fromkeys(place for place, _ in found if place[0] == dtype))
        names = list(dict.fromkeys(name for place, name in found if place[0] == dtype))
        header = ("", *(f"{prompt} {_link(link)}" for _, prompt, link in places))
        rows = []
        for name in names:
            family, mode = name.split("/")
            star = " *" if modes[dtype, family] == mode else ""
            rows.append((f"{name}{star}", *(_ms(found.get((place, name))) for place in places)))
        title = f"{_TITLE[metric]}: {dtype}, medians in ms (* the mode that the ratios take)"
        lines += ["", title, *table(header, rows)]
    return lines


def _windows(workload: Mapping[str, Any]) -> list[str]:
    rows = []
    for place, found in windows(workload).items():
        dtype, prompt, link = place
        fits = "yes" if found.fits else "no"
        times = (_kib(found.payload), f"{_ms(found.transfer)} ms", f"{_ms(found.attention)} ms")
        rows.append((dtype, str(prompt), _link(link), *times, fits))
    header = ("dtype", "prompt", "link", "all-reduce", "on the link", "attention", "fits (marked)")
    return (
        ["", "could a link carry a layer's all-reduce behind the next attention?", *table(header, rows)] if rows else []
    )


def _hidden(workload: Mapping[str, Any]) -> list[str]:
    found = hidden(workload)
    places = list(dict.fromkeys(place for one in found for place in one.shares))
    rows = [
        (
            f"{one.metric.upper()} {one.family}",
            f"{one.together:.0%}",
            *(_share(one.shares.get(place)) for place in places),
        )
        for one in found
    ]
    header = ("", "together", *map(_at, places))
    title = "share of the communication hidden: (standard - x) / (standard - no communication)"
    return ["", title, *table(header, rows)] if rows else []


def _kernel(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = {(place_of(cell), cell["contender"]): fmean(cell["kernel"]) for cell in cells if cell.get("kernel")}
    places = list(dict.fromkeys(place for place, _ in shares))
    names = list(dict.fromkeys(name for _, name in shares))
    rows = [(name, *(_share(shares.get((place, name))) for place in places)) for name in names]
    title = "share of its core that the kernel had in a prefill, on the rank where it had most"
    return ["", title, *table(("", *map(_at, places)), rows)] if any(shares.values()) else []


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _ratios(found: Sequence[Ratio], workload: Mapping[str, Any]) -> list[str]:
    marked = {place for place, one in windows(workload).items() if one.fits}
    rows = []
    for ratio in found:
        aim = ratio.aim
        ends = f"{ratio.low:.2f} ({_at(ratio.low_at)})", f"{ratio.high:.2f} ({_at(ratio.high_at)})"
        verdict = {True: "holds", False: "MISSED", None: ""}[ratio.holds]
        wanted = [f">= {aim.at_least:g}"] if aim.at_least is not None else []
        wanted += [f"<= {aim.at_most:g}"] if aim.at_most is not None else []
        wanted += [f"no cell < {aim.every:g}"] if aim.every is not None else []
        wanted += [f"<= {aim.at_most_marked:g} in marked cells"] if aim.at_most_marked is not None else []
        rows.append((aim.name, ratio.scope, f"{ratio.mean:.2f}", *ends, ", ".join(wanted), verdict))
    header = ("ratio", "dtype", "geomean", "lowest cell", "highest cell", "aim", "")
    lines = ["", f"ratios over the cells ({len(marked)} cells are marked)", *table(header, rows)] if rows else []
    return lines + _marked_cells(found, marked, workload)


def _marked_cells(found: Sequence[Ratio], marked: set[Place], workload: Mapping[str, Any]) -> list[str]:
    lines = []
    if any((ratio.aim.metric, ratio.aim.over, ratio.aim.under) == ("ttft", "kraken", BOUND) for ratio in found):
        families = of_families(workload["cells"], "ttft")
        over, under = families["kraken"], families[BOUND]
        rows = [
            (*map(str, place), f"{paired(over[place], under[place]):.2f}", "marked" if place in marked else "")
            for place in over
            if place in under
        ]
        lines += ["", f"TTFT kraken / {BOUND}, cell by cell"]
        lines += table(("dtype", "prompt", "link", "ratio", ""), rows)
    return lines


def _checked(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    right = [check for check in checks if check["right"]]
    lines = []
    for dtype in dict.fromkeys(check["dtype"] for check in right):
        found = [check for check in right if check["dtype"] == dtype]
        worst = max(found, key=lambda check: check["error"] / check["allowed"])
        lines.append(
            f"checked before timing, {dtype}: {len(found)} right; the worst relative error of a token's logits is "
            f"{worst['error']:.1e} ({worst['contender']}, allowed {worst['allowed']:.1e})"
        )
    return lines


def _disturbed(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = {place_of(cell): cell["others"] or 0 for cell in cells}
    busy = [place for place, share in shares.items() if share > BUSY]
    if not busy:
        return []
    worst = max(shares, key=shares.__getitem__)
    return [
        f"DISTURBED: in {len(busy)} of {len(shares)} places other processes took more than {BUSY:.0%} of the cores, "
        f"at most {shares[worst]:.0%} ({_at(worst)})"
    ]


def _not_timed(check: Mapping[str, Any]) -> str:
    verdict = "FAILED" if "failed" in check else "WRONG"
    return f"{verdict}, not timed: {check['contender']}, {check['dtype']}, prompt {check['prompt']}: {check['why']}"


def _families(workload: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(check["contender"].split("/")[0] for check in workload["checks"]))


def _place(place: Place) -> dict[str, Any]:
    return dict(zip(("dtype", "prompt", "link"), place))


def _at(place: Place) -> str:
    dtype, prompt, link = place
    return f"{dtype} {prompt} {_link(link)}"


def _link(link: str) -> str:
    return link if link == "unlimited" else f"{link}G"


def _kib(size: float | str) -> str:
    return f"{float(size) / 1024:.4g} KiB"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under a header, in columns as wide as they need to be."""
    body = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in body]
