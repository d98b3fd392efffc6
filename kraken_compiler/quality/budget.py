"""Chooses a form for every layer, so that as little communication as possible is waited for within a quality budget.

What counts is the share of the standard form's bytes that nobody waits for any more, or, where a machine is known, the
share of its predicted time that is saved.

Layers give up communication in small steps: from `standard` to `sync-drop`, which halves what a layer waits for, from
there or at once to `delayed`, which sends as much as `standard` and hides it, or to `kraken`, which hides half as much
and sends no more. Steps are ordered by what they cost in a layer alone for what they
save, so a prefix of them is what a knapsack would take; the longest prefix within the budget is found by
bisection. The costs, scaled to what was measured last, say where to look next; but every candidate is calibrated and
measured, none is taken on a prediction.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.forms import DELAYED, FORMS, KRAKEN, STANDARD, SYNC_DROP
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.schedule import FormPlan
from kraken_compiler.lanes.evaluate import Quality
from kraken_compiler.passes.form.derive_schedule import derive_plan
from kraken_compiler.text import number_text, table

CHANGES = (KRAKEN.name, DELAYED.name, SYNC_DROP.name)
"""Forms that a layer may take within a budget."""


@dataclass(frozen=True)
class Budget:
    """A limit on what a rewrite may cost.

    Attributes:
        max_kl: Most KL to the source model, nats per token; None means any.
        max_perplexity_increase: Most that the perplexity may grow, as a share of the source's; None means any.
    """

    max_kl: float | None = None
    max_perplexity_increase: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.max_kl, self.max_perplexity_increase) if limit is not None]
        if not limits:
            raise UsageError("a budget needs a limit: --max-kl or --max-ppl-increase")
        if not all(limit > 0 for limit in limits):
            raise UsageError("a budget must be above 0; --form standard changes nothing")

    def used(self, quality: Quality) -> float:
        """Share of the budget that a measurement uses: above 1 it does not hold. Infinite if it is no number."""
        kl = quality.kl / self.max_kl if self.max_kl is not None else 0.0
        limit = self.max_perplexity_increase
        perplexity = perplexity_increase(quality) / limit if limit is not None else 0.0
        return math.inf if math.isnan(kl) or math.isnan(perplexity) else max(kl, perplexity)

    def holds(self, quality: Quality) -> bool:
        """True if a measurement is within the budget; a number that is none is not."""
        return self.used(quality) <= 1

    def __str__(self) -> str:
        parts = [] if self.max_kl is None else [f"KL at most {self.max_kl:g}"]
        if self.max_perplexity_increase is not None:
            parts.append(f"perplexity at most {self.max_perplexity_increase:.3g} above the source's")
        return " and ".join(parts)


def perplexity_increase(quality: Quality) -> float:
    """Increase of the perplexity, as a share of the source's."""
    return quality.perplexity / quality.source_perplexity - 1


@dataclass(frozen=True)
class Traffic:
    """All-reduce bytes of a choice of forms, beside those of the standard form.

    Attributes:
        standard: Bytes per token that the standard form sends, and waits for.
        sent: Bytes per token that are sent.
        hidden: Those of them that are on their way while a branch computes.
    """

    standard: int
    sent: int
    hidden: int

    @property
    def spared_bytes(self) -> int:
        """Bytes per token of the standard form that nobody waits for: hidden, or never sent."""
        return self.standard - (self.sent - self.hidden)

    @property
    def spared(self) -> float:
        """Share of the standard form's bytes that nobody waits for."""
        return self.spared_bytes / self.standard

    @property
    def hidden_share(self) -> float:
        """Share of the bytes sent that are hidden."""
        return self.hidden / self.sent if self.sent else 0.0


@dataclass(frozen=True)
class Payloads:
    """Bytes that the branches of a model send.

    Attributes:
        part: Bytes per token of a branch's output.
        inside: For branches whose norms need whole sums themselves, by number: the bytes per token of those.
        lookups: Bytes per token of the embeddings' sums, which every form waits for.
    """

    part: int = 1
    inside: Mapping[int, int] = field(default_factory=dict)
    lookups: int = 0

    @classmethod
    def of(cls, standard: FormPlan) -> Payloads:
        """The payloads of a model, from its program in standard form."""
        inside: dict[int, int] = {}
        for reduce in standard.reduces:
            if reduce.is_inside:
                inside[reduce.last] = inside.get(reduce.last, 0) + reduce.bytes_per_token
        parts = [reduce for reduce in standard.reduces if not reduce.is_inside and not reduce.is_lookup]
        lookups = sum(reduce.bytes_per_token for reduce in standard.reduces if reduce.is_lookup)
        return cls(min(reduce.bytes_per_token for reduce in parts), inside, lookups)


def traffic(branches: Sequence[Branch], forms: Sequence[str], payloads: Payloads = Payloads()) -> Traffic:
    """All-reduce bytes per token of a choice of forms.

    Args:
        branches: Of the whole model, in order.
        forms: The form of every layer.
        payloads: What the branches send.
    """
    standard = derive_plan(branches, [STANDARD] * len(forms), payloads.part)
    plan = derive_plan(branches, [FORMS[form] for form in forms], payloads.part)
    hidden = sum(reduce.bytes_per_token for reduce in plan.reduces if reduce.window)
    return Traffic(_bytes_sent(branches, standard, payloads), _bytes_sent(branches, plan, payloads), hidden)


def _bytes_sent(branches: Sequence[Branch], plan: FormPlan, payloads: Payloads) -> int:
    # A branch that reads its peers late takes the means of its own columns and sends nothing.
    fresh = [read.branch for read in plan.reads if read.own == read.peers == branches[read.branch - 1].reads]
    inside = sum(payloads.inside.get(number, 0) for number in fresh)
    return payloads.lookups + inside + sum(reduce.bytes_per_token for reduce in plan.reduces)


@dataclass(frozen=True)
class Candidate:
    """A choice of forms and what it was measured to cost.

    Attributes:
        forms: The form of every layer.
        traffic: Its communication.
        kl: KL to the source, nats per token.
        perplexity_increase: As a share of the source's perplexity.
        used: The share of the budget that it uses.
        seconds: What the load takes with it, as predicted; None if no machine is known.
    """

    forms: tuple[str, ...]
    traffic: Traffic
    kl: float
    perplexity_increase: float
    used: float
    seconds: float | None = None

    @property
    def within(self) -> bool:
        """True if the budget allows it."""
        return self.used <= 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "spared": self.traffic.spared, "hidden_share": self.traffic.hidden_share}


@dataclass(frozen=True)
class Choice:
    """Result of a search for forms.

    Attributes:
        budget: The limit, for people.
        best: The candidate that saves most within the budget; None if only the standard form is.
        frontier: Everything that was measured, from the least saved to the most.
        standard_seconds: What the load takes in standard form, as predicted; None if no machine is known.
    """

    budget: str
    best: Candidate | None
    frontier: tuple[Candidate, ...] = field(default=())
    standard_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "best": self.best.to_dict() if self.best else None,
            "frontier": [candidate.to_dict() for candidate in self.frontier],
            "standard_seconds": self.standard_seconds,
        }

    def lines(self) -> list[str]:
        """A table for people: quality against the share of communication that nobody waits for, and predicted time."""
        standard = self.standard_seconds
        header = (
            *CHANGES,
            "not waited for",
            "of what is sent, hidden",
            *(("ms",) if standard else ()),
            "KL",
            "perplexity",
            "",
        )
        lines = table(header, (_row(candidate, candidate is self.best) for candidate in self.frontier))
        return lines if standard is None else [*lines, f"standard takes {standard * 1e3:.4g} ms"]


Measure = Callable[[tuple[str, ...]], Quality]
"""Calibrates the model with these forms of its layers, and measures it on text that it was not fitted to."""

SecondsOf = Callable[[tuple[str, ...]], float]
"""Predicts how long the load takes with these forms of the layers."""


def choose_forms(
    branches: Sequence[Branch],
    costs: Mapping[str, Sequence[float]],
    measure: Measure,
    budget: Budget,
    payloads: Payloads = Payloads(),
    seconds_of: SecondsOf | None = None,
) -> Choice:
    """Search for the forms that wait for the least communication, or take the least time, within a budget.

    Args:
        branches: Of the whole model, in order.
        costs: By form, for every layer what the form costs there alone; only ratios count.
        measure: Measures a choice, never the same one twice.
        budget: The limit.
        payloads: What the branches send.
        seconds_of: Predicts times, which then count in place of bytes.
    """
    all_standard = (STANDARD.name,) * _count(costs)
    standard_seconds = seconds_of(all_standard) if seconds_of is not None else None
    saved = _savings(branches, all_standard, payloads, seconds_of)

    def traffic_of(forms: Sequence[str]) -> Traffic:
        return traffic(branches, forms, payloads)

    steps = _steps(costs, saved)
    path = list(itertools.accumulate(steps, _with_step, initial=all_standard))
    expected_costs = list(itertools.accumulate((step.cost for step in steps), initial=0.0))
    saved_shares = [saved(forms) for forms in path]
    candidates: list[Candidate] = []
    lower, upper, scale = 0, len(path), 0.0
    while upper - lower > 1 and (upper == len(path) or saved_shares[upper] - saved_shares[lower] > _FINE):
        middle = _next(expected_costs, lower, upper, 1 / scale if scale > 0 else None)
        quality = measure(path[middle])
        share, increase = budget.used(quality), perplexity_increase(quality)
        seconds = seconds_of(path[middle]) if seconds_of is not None else None
        candidates.append(Candidate(path[middle], traffic_of(path[middle]), quality.kl, increase, share, seconds))
        if share <= 1:
            lower = middle
        else:
            upper = middle
        scale = share / expected_costs[middle] if expected_costs[middle] > 0 else 0.0
    candidates.sort(key=lambda candidate: (saved(candidate.forms), candidate.kl))
    within = [candidate for candidate in candidates if candidate.within]
    return Choice(str(budget), within[-1] if within else None, tuple(candidates), standard_seconds)


def saves_nothing(
    branches: Sequence[Branch], layers: int, payloads: Payloads = Payloads(), seconds_of: SecondsOf | None = None
) -> bool:
    """Whether no form of any layer alone saves anything, so that there is nothing to search; see `choose_forms`."""
    saved = _savings(branches, (STANDARD.name,) * layers, payloads, seconds_of)
    return not any(saved(_alone(form, layer, layers)) > _NOTHING for form in CHANGES for layer in range(layers))


def _savings(
    branches: Sequence[Branch], standard: tuple[str, ...], payloads: Payloads, seconds_of: SecondsOf | None
) -> Callable[[tuple[str, ...]], float]:
    """The share of the standard form's bytes that nobody waits for in others, or of its time that they save."""
    if seconds_of is None:
        return lambda forms: traffic(branches, forms, payloads).spared
    seconds, standard_seconds = seconds_of, seconds_of(standard)
    return lambda forms: 1 - seconds(forms) / standard_seconds


_FINE = 1 / 40
"""The search ends when the next choice over the budget would save no more than this share besides."""
_NOTHING = 1e-9
"""A smaller share is rounding."""


@dataclass(frozen=True)
class _Step:
    """Change of one layer to a form that saves more.

    Attributes:
        layer: Its number.
        form: Its new form.
        cost: What that costs beyond the layer's form before.
        rate: The same for the share that it saves beyond that form.
    """

    layer: int
    form: str
    cost: float
    rate: float


def _steps(costs: Mapping[str, Sequence[float]], saved: Callable[[tuple[str, ...]], float]) -> list[_Step]:
    """The steps of all layers, the cheapest for what they save first; a layer's own are in the order it takes them."""
    layers = _count(costs)
    steps = []
    for layer in range(layers):
        share, cost = 0.0, 0.0
        forms = list(costs)
        while forms:
            changes = []
            for form in forms:
                more = saved(_alone(form, layer, layers)) - share
                # What is no number is no cost: that form is not for this layer.
                if more > _NOTHING and math.isfinite(costs[form][layer]):
                    extra = costs[form][layer] - cost
                    changes.append((extra / more, -more, _Step(layer, form, extra, extra / more)))
            if not changes:
                break
            _, less, step = min(changes, key=lambda one: one[:2])
            steps.append(step)
            share, cost = share - less, cost + step.cost
            forms.remove(step.form)
    return sorted(steps, key=lambda step: step.rate)


def _alone(form: str, layer: int, layers: int) -> tuple[str, ...]:
    """The forms of all layers where one alone is changed."""
    return tuple(form if other == layer else STANDARD.name for other in range(layers))


def _count(costs: Mapping[str, Sequence[float]]) -> int:
    """Number of layers."""
    return len(next(iter(costs.values())))


def _with_step(forms: tuple[str, ...], step: _Step) -> tuple[str, ...]:
    return (*forms[: step.layer], step.form, *forms[step.layer + 1 :])


def _next(expected_costs: Sequence[float], lower: int, upper: int, limit: float | None) -> int:
    """The number of steps to try next, between `lower` and `upper`.

    Args:
        expected_costs: What 0, 1, 2, ... steps are expected to cost.
        lower, upper: Numbers of steps known to be within and over the budget.
        limit: What the budget allows, in units of `expected_costs`; None if nothing was measured yet.
    """
    if limit is None:
        return (lower + upper) // 2
    fitting = bisect.bisect_right(expected_costs, limit) - 1
    return min(max(fitting, lower + 1), upper - 1)


def _row(candidate: Candidate, best: bool) -> tuple[str, ...]:
    return (
        *(str(candidate.forms.count(form)) for form in CHANGES),
        f"{candidate.traffic.spared:.0%}",
        f"{candidate.traffic.hidden_share:.0%}",
        *(() if candidate.seconds is None else (f"{candidate.seconds * 1e3:.4g}",)),
        number_text(candidate.kl, ".4f"),
        f"{number_text(candidate.perplexity_increase * 100, '+.1f')} %",
        "chosen" if best else "" if candidate.within else "over the budget",
    )
