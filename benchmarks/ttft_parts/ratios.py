"""From raw samples to ratios: medians per cell, geometric means over cells, and what was aimed at.

A cell's ratio is the median over its repetitions of the two times of one repetition, which were measured seconds apart:
a machine that is slow for a minute is slow for both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttft_parts.contenders import BOUND, DTENSOR, FORMS, MODES, SPLIT, TP_PLAN
from ttft_parts.network import gbits
from ttft_parts.windows import Window, window

METRICS = ("ttft", "tpot")
MARKED = "marked"
Place = tuple[str, int, str]
"""Where something was measured: dtype, prompt, link."""


@dataclass(frozen=True)
class Aim:
    """A ratio of two times and what it should be, as a geometric mean over the cells.

    A family stands for its better mode; a contender's whole name for itself, such as what transformers does unasked.

    Attributes:
        at_least, at_most: Bounds of the mean.
        every: What no cell may be below.
        at_most_marked: What no marked cell may be above.
        prompt: The only one that counts; None takes all.
    """

    metric: str
    over: str
    under: str
    at_least: float | None = None
    every: float | None = None
    at_most_marked: float | None = None
    at_most: float | None = None
    prompt: int | None = None

    @property
    def name(self) -> str:
        """What the ratio is called where it is shown."""
        prompt = "" if self.prompt is None else f", prompt {self.prompt}"
        return f"{self.metric.upper()} {self.over} / {self.under}{prompt}"


AIMS = (
    Aim("ttft", "standard", "kraken", at_least=1.36, every=1.0),
    Aim("ttft", TP_PLAN, "kraken", at_least=1.6, every=1.0),
    Aim("ttft", f"{TP_PLAN}/eager", "kraken", at_least=1.6, every=1.0),
    Aim("ttft", DTENSOR, "kraken"),
    Aim("ttft", "kraken", BOUND, at_most_marked=1.15),
    Aim("ttft", TP_PLAN, "standard", at_least=1.0),
    Aim("ttft", DTENSOR, "standard", at_least=1.0),
    Aim("ttft", "standard/gloo", "kraken/gloo"),
    Aim("ttft", "standard", BOUND),
    Aim("ttft", "standard", "ladder"),
    Aim("ttft", "standard", "delayed"),
    Aim("ttft", "standard", "sync-drop"),
    Aim("ttft", "standard", "native"),
    Aim("ttft", "kraken", "native"),
    Aim("ttft", "standard", "standard+split"),
    Aim("ttft", "standard+split", "kraken", at_most=1.08, prompt=512),
    Aim("ttft", "standard+split", BOUND),
    Aim("ttft", "kraken", "kraken+split"),
    Aim("ttft", "standard", "sync-drop+split"),
    Aim("tpot", "standard", "kraken", at_least=1.2),
    Aim("tpot", TP_PLAN, "kraken", at_least=2.0),
    Aim("tpot", f"{TP_PLAN}/eager", "kraken", at_least=2.0),
    Aim("tpot", DTENSOR, "kraken"),
    Aim("tpot", "standard/gloo", "kraken/gloo"),
    Aim("tpot", "standard", BOUND),
    Aim("tpot", "kraken", BOUND),
    Aim("tpot", "standard", "native"),
    Aim("tpot", TP_PLAN, "standard", at_least=1.0),
    Aim("tpot", DTENSOR, "standard", at_least=1.0),
)


@dataclass(frozen=True)
class Ratio:
    """One aim over the cells of a dtype (or of all): geometric mean, both ends, verdict (None: nothing aimed at)."""

    aim: Aim
    scope: str
    mean: float
    low: float
    low_at: Place
    high: float
    high_at: Place
    cells: int
    holds: bool | None


@dataclass(frozen=True)
class Hidden:
    """How much of the communication that `standard` waits for a family hides: it does not depend on how slow links are.

    Attributes:
        metric, family: What was measured.
        shares: By place, time saved over time lost, (standard - family) / (standard - no communication); None where
            nothing is lost.
        together: The times saved over the times lost, both summed over all places.
    """

    metric: str
    family: str
    shares: dict[Place, float | None]
    together: float


def geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def samples(cells: Iterable[Mapping[str, Any]], metric: str) -> dict[tuple[Place, str], list[float]]:
    """Seconds of every repetition, by place and contender."""
    return {(place_of(cell), cell["contender"]): cell[metric] for cell in cells if cell[metric]}


def medians(cells: Iterable[Mapping[str, Any]], metric: str) -> dict[tuple[Place, str], float]:
    """Median seconds by place and contender."""
    return {key: statistics.median(found) for key, found in samples(cells, metric).items()}


def paired(over: Sequence[float], under: Sequence[float]) -> float:
    """The ratio of two contenders that were measured in the same repetitions.

    Raises:
        ValueError: They were not.
    """
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def best_modes(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, str], str]:
    """For every dtype and family the faster mode, by the geometric mean over all cells of the dtype.

    One mode for the whole dtype, as somebody who serves the model would have to choose one. A mode that lacks a cell
    that the other one has is not chosen.
    """
    by_mode: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (place, contender), value in medians(cells, metric).items():
        family, mode = contender.split("/")
        by_mode.setdefault((place[0], family), {}).setdefault(mode, []).append(value)
    return {
        key: min(modes, key=lambda mode: (-len(modes[mode]), geomean(modes[mode]), MODES.index(mode)))
        for key, modes in by_mode.items()
    }


def of_families(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[Place, list[float]]]:
    """Every family's samples in its better mode, by place; and, under their whole names, all contenders'."""
    modes = best_modes(cells, metric)
    found: dict[str, dict[Place, list[float]]] = {}
    for (place, contender), values in samples(cells, metric).items():
        family, mode = contender.split("/")
        found.setdefault(contender, {})[place] = values
        if modes[place[0], family] == mode:
            found.setdefault(family, {})[place] = values
    return found


def hidden(workload: Mapping[str, Any]) -> list[Hidden]:
    """Of every family of ours that was measured beside `standard` and the bound."""
    found = []
    for metric in METRICS:
        families = of_families(workload["cells"], metric)
        standard, bound = families.get("standard", {}), families.get(BOUND, {})
        places = [place for place in standard if place in bound]
        for family in [name for name in families if name.removesuffix(SPLIT) in FORMS and name != "standard"]:
            inside = [place for place in places if place in families[family]]
            lost = {place: _difference(standard[place], bound[place]) for place in inside}
            saved = {place: _difference(standard[place], families[family][place]) for place in inside}
            if sum(lost.values()) > 0:
                shares = {place: saved[place] / lost[place] if lost[place] > 0 else None for place in inside}
                found.append(Hidden(metric, family, shares, sum(saved.values()) / sum(lost.values())))
    return found


def _difference(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(one - other for one, other in zip(over, under, strict=True))


def windows(workload: Mapping[str, Any]) -> dict[Place, Window]:
    """The window of every cell in which the bound was measured.

    The unlimited link has no rate to calculate with; it takes the one that was measured on it.
    """
    found = {}
    for place, seconds in of_families(workload["cells"], "ttft").get(BOUND, {}).items():
        dtype, prompt, link = place
        rate = gbits(link) or workload["links"][dtype][link]["gbits"]
        found[place] = window(workload["shape"], dtype, prompt, workload["degree"], rate, statistics.median(seconds))
    return found


def ratios(workload: Mapping[str, Any], aims: Sequence[Aim] = AIMS) -> list[Ratio]:
    """Every aim for which both families were measured, for each dtype and over all."""
    families = {metric: of_families(workload["cells"], metric) for metric in METRICS}
    marked = {place for place, found in windows(workload).items() if found.fits}
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in workload["cells"]))
    found = []
    for aim in aims if workload["has_aims"] else _without_demands(aims):
        over, under = (families[aim.metric].get(family, {}) for family in (aim.over, aim.under))
        places = [place for place in over if place in under and aim.prompt in (None, place[1])]
        values = {place: paired(over[place], under[place]) for place in places}
        for scope in [*dtypes, *["all"] * (len(dtypes) > 1)]:
            inside = {place: value for place, value in values.items() if scope in (place[0], "all")}
            if inside:
                found.append(_ratio(aim, scope, inside, marked))
    return found


def _without_demands(aims: Sequence[Aim]) -> list[Aim]:
    return list(dict.fromkeys(Aim(aim.metric, aim.over, aim.under) for aim in aims))


def _ratio(aim: Aim, scope: str, values: dict[Place, float], marked: set[Place]) -> Ratio:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    mean = geomean(values.values())
    demands = []
    if aim.at_least is not None:
        demands.append(mean >= aim.at_least)
    if aim.at_most is not None:
        demands.append(mean <= aim.at_most)
    if aim.every is not None:
        demands.append(values[low] >= aim.every)
    if aim.at_most_marked is not None:
        demands += [value <= aim.at_most_marked for place, value in values.items() if place in marked]
    holds = all(demands) if demands else None
    return Ratio(aim, scope, mean, values[low], low, values[high], high, len(values), holds)


def place_of(cell: Mapping[str, Any]) -> Place:
    """Where a cell was measured."""
    return cell["dtype"], cell["prompt"], cell["link"]
