"""The search for forms within a budget, on made-up costs: its answer against trying everything on its path."""

from __future__ import annotations

import itertools
import math

import pytest

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.schedule import FormPlan, Reduce
from kraken_compiler.lanes.evaluate import ByPosition, Quality
from kraken_compiler.quality.budget import Budget, Payloads, choose_forms, perplexity_increase, traffic

LAYERS = 7
COSTS_OF_TWO = {"kraken": [1.0, 1.0], "sync-drop": [1.0, 1.0]}
COST = {"standard": 0.0, "kraken": 1.0, "sync-drop": 0.3}


def branches(layers: int) -> list[Branch]:
    return [
        Branch(2 * layer + number + 1, layer, kind, "", "", 2 * layer + number, "", ())
        for layer in range(layers)
        for number, kind in enumerate(("attention", "ffn"))
    ]


def quality(kl: float, increase: float = 0.0) -> Quality:
    return Quality(kl, math.nan, 1.0, 20 * (1 + increase), 20.0, 100, "text", ByPosition((), (), (), (), ()))


def cost(forms: tuple[str, ...]) -> float:
    """Layer 0 costs most; the last costs a seventh of that."""
    return sum(COST[form] * (LAYERS - layer) / 100 for layer, form in enumerate(forms))


def test_traffic_of_the_forms() -> None:
    standard = traffic(branches(4), ["standard"] * 4)
    assert (standard.standard, standard.sent, standard.hidden, standard.spared) == (8, 8, 0, 0.0)
    kraken = traffic(branches(4), ["kraken"] * 4)
    # Half is not sent, and of the rest only the last sum is waited for.
    assert (kraken.sent, kraken.hidden) == (4, 3)
    assert kraken.spared == 7 / 8
    assert kraken.hidden_share == 3 / 4
    dropped = traffic(branches(4), ["sync-drop"] * 4)
    assert (dropped.sent, dropped.hidden, dropped.spared) == (4, 0, 0.5)
    late = traffic(branches(4), ["standard", "standard", "kraken", "kraken"])
    # The last sum before the first kraken layer is hidden too.
    assert (late.sent, late.hidden, late.spared) == (6, 2, 0.5)


def test_norms_that_need_whole_sums_are_waited_for() -> None:
    """Attention sends three numbers more wherever it reads what the source reads; a late branch sends none."""
    model = branches(4)
    sums = [Reduce(number, number, number, number + 1, (), 256) for number in range(1, 9)]
    means = [Reduce(9, number, number, number, (), size) for number in (1, 3, 5, 7) for size in (8, 4)]
    payloads = Payloads.of(FormPlan((), (), (*sums, *means)))
    assert payloads == Payloads(256, {1: 12, 3: 12, 5: 12, 7: 12})
    standard = traffic(model, ["standard"] * 4, payloads)
    assert (standard.standard, standard.sent, standard.spared) == (2096, 2096, 0.0)
    kraken = traffic(model, ["kraken"] * 4, payloads)
    assert (kraken.standard, kraken.sent, kraken.hidden) == (2096, 4 * 256 + 12, 3 * 256)
    dropped = traffic(model, ["sync-drop"] * 4, payloads)
    assert dropped.sent == 4 * 256 + 4 * 12


@pytest.mark.parametrize("limit", [0.001, 0.012, 0.05, 0.1, 0.2, 0.3, 5.0])
def test_nothing_within_the_budget_spares_more_by_a_layer(limit: float) -> None:
    """Against every choice of forms there is, for costs that add up and are known up to a factor, and not exactly."""
    model, layers = branches(LAYERS), range(LAYERS)
    asked: list[tuple[str, ...]] = []

    def measure(forms: tuple[str, ...]) -> Quality:
        asked.append(forms)
        return quality(cost(forms))

    alone = [7 * (LAYERS - layer) * (1.02 if layer % 2 else 1.0) for layer in layers]
    costs = {form: [COST[form] * one for one in alone] for form in ("kraken", "sync-drop")}
    choice = choose_forms(model, costs, measure, Budget(max_kl=limit))
    assert len(asked) == len(set(asked)) == len(choice.frontier) <= 7
    every = [forms for forms in itertools.product(COST, repeat=LAYERS) if cost(forms) <= limit]
    most = max(traffic(model, forms).spared for forms in every)
    if choice.best is None:
        assert most <= 1 / LAYERS
    else:
        assert choice.best.kl <= limit
        assert choice.best.traffic.spared >= most - 1 / LAYERS
        assert "chosen" in "\n".join(choice.lines())
    spared = [candidate.traffic.spared for candidate in choice.frontier]
    assert spared == sorted(spared)
    assert [candidate["kl"] for candidate in choice.to_dict()["frontier"]] == [one.kl for one in choice.frontier]


def test_steps_that_cost_least_for_their_bytes_come_first() -> None:
    """Layer 0 halves what it waits for, for little, and does not go on; layer 1 hides all at once; layer 2 is dear."""

    def measure(forms: tuple[str, ...]) -> Quality:
        return quality(0.1 * forms.count("kraken") + 0.04 * forms.count("sync-drop"))

    costs = {"kraken": [3.0, 1.0, 6.0], "sync-drop": [0.6, 0.9, 3.0]}
    choice = choose_forms(branches(3), costs, measure, Budget(0.15))
    assert choice.best is not None
    assert choice.best.forms == ("sync-drop", "kraken", "standard")


def test_of_forms_that_spare_the_same_a_layer_takes_the_cheaper() -> None:
    def measure(forms: tuple[str, ...]) -> Quality:
        return quality(0.1 * forms.count("kraken") + 0.06 * forms.count("delayed"))

    costs = {"kraken": [1.0, 3.0, 3.0], "delayed": [2.0, 2.0, 2.0], "sync-drop": [5.0, 5.0, 5.0]}
    choice = choose_forms(branches(3), costs, measure, Budget(1.0))
    assert choice.best is not None
    assert choice.best.forms == ("kraken", "delayed", "delayed")
    assert "delayed" in choice.lines()[0]


def test_where_times_are_known_they_count_and_not_bytes() -> None:
    """Layer 1's communication is free already, however many bytes it sends."""

    def seconds(forms: tuple[str, ...]) -> float:
        return 1.0 - sum(0.1 for layer in (0, 2) if forms[layer] != "standard")

    costs = {"kraken": [1.0, 0.1, 1.0], "sync-drop": [2.0, 0.1, 2.0]}
    choice = choose_forms(branches(3), costs, lambda forms: quality(0.1), Budget(1.0), seconds_of=seconds)
    assert choice.best is not None
    assert choice.best.forms == ("kraken", "standard", "kraken")
    assert choice.best.seconds == pytest.approx(0.8)
    assert choice.standard_seconds == 1.0
    assert choice.lines()[-1] == "standard takes 1000 ms"
    assert choice.to_dict()["best"]["seconds"] == choice.best.seconds


def test_good_expectations_save_measurements() -> None:
    asked = []

    def measure(forms: tuple[str, ...]) -> Quality:
        asked.append(forms)
        return quality(forms.count("kraken") * 0.01)

    costs = {"kraken": [1.0] * 40, "sync-drop": [2.0] * 40}
    choice = choose_forms(branches(40), costs, measure, Budget(0.315))
    assert choice.best is not None
    assert choice.best.forms.count("kraken") == 31
    # The middle, the right one, the one above it.
    assert len(asked) == 3


def test_what_is_no_number_is_over_the_budget() -> None:
    choice = choose_forms(branches(2), COSTS_OF_TWO, lambda forms: quality(math.nan), Budget(0.1))
    assert choice.best is None
    assert all(candidate.used == math.inf for candidate in choice.frontier)


def test_budgets() -> None:
    both = Budget(max_kl=0.1, max_perplexity_increase=0.02)
    assert both.holds(quality(0.1, 0.019))
    assert not both.holds(quality(0.11, 0.0))
    assert not both.holds(quality(0.0, 0.03))
    assert not Budget(max_kl=0.1).holds(quality(math.nan))
    assert Budget(max_kl=0.1).holds(quality(0.05, 9.0))
    assert str(both) == "KL at most 0.1 and perplexity at most 0.02 above the source's"
    assert perplexity_increase(quality(0, 0.25)) == pytest.approx(0.25)
    with pytest.raises(UsageError, match="needs a limit"):
        Budget()
    with pytest.raises(UsageError, match="above 0"):
        Budget(max_kl=0.0)
