"""The arithmetic of `benchmarks/ttft.py` on made-up samples, and one small run of it over loopback."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Behind the packages: that folder also has an `onnx`.
sys.path.append(str(ROOT / "benchmarks"))

import runs  # noqa: E402
from ttft_parts import contenders, network  # noqa: E402
from ttft_parts.measure import Plan, _Session  # noqa: E402
from ttft_parts.rank_loop import kernel_seconds  # noqa: E402
from ttft_parts.ranks import CommandError  # noqa: E402
from ttft_parts.ratios import best_modes, geomean, hidden, of_families, paired, ratios, windows  # noqa: E402
from ttft_parts.report import summary, text  # noqa: E402
from ttft_parts.windows import attention_share, window  # noqa: E402
from ttft_parts.workloads import WORKLOADS, prompt_ids  # noqa: E402

SHAPE = {
    "layers": 8,
    "width": 1024,
    "heads": 16,
    "kv_heads": 8,
    "head_width": 64,
    "ffn": 2816,
    "vocabulary": 32000,
    "parameters": 160_000_000,
}


def cells(dtype: str, link: str, prompt: int, ttft: dict[str, list[float]], tpot: float = 0.02) -> list[dict[str, Any]]:
    place = {"dtype": dtype, "link": link, "prompt": prompt, "others": 0.0}
    return [
        {**place, "contender": name, "ttft": samples, "tpot": [tpot] * bool(samples)} for name, samples in ttft.items()
    ]


@pytest.fixture
def workload() -> dict[str, Any]:
    """Two links, one prompt, one dtype; the kraken form is faster compiled, by 1.5 and by 0.9 against standard."""
    fast = {
        "standard/eager": [0.15, 0.30, 0.14],
        "kraken/eager": [0.2, 0.2, 0.2],
        "kraken/compiled": [0.1, 0.2, 0.1],
        "bound/eager": [0.1, 0.1, 0.1],
    }
    slow = {"standard/eager": [0.18], "kraken/eager": [0.19], "kraken/compiled": [0.2], "bound/eager": [0.1]}
    return {
        "name": "llama",
        "degree": 2,
        "has_aims": True,
        "shape": SHAPE,
        "network": {"kind": "namespaces", "note": ""},
        "pinned": True,
        "new_tokens": 32,
        "links": {
            "float32": {
                "unlimited": {"gbits": 16.0, "all_reduce": {"4096": 1e-4}},
                "1": {"gbits": 0.95, "all_reduce": {"4096": 2e-4}},
            }
        },
        "checks": [
            {"dtype": "float32", "prompt": 128, "contender": "standard/eager", "right": True, "error": 1e-6,
             "allowed": 1e-3, "why": ""},
            {"dtype": "float32", "prompt": 128, "contender": "ladder/eager", "right": False, "why": "token 3 differs"},
        ],
        "cells": cells("float32", "unlimited", 128, fast) + cells("float32", "1", 128, slow),
        "problems": ["ladder float32: cannot be compiled: for a made-up reason\nand a second line"],
    }  # fmt: skip


def test_a_geometric_mean_treats_twice_and_half_alike() -> None:
    assert geomean([2.0, 0.5]) == pytest.approx(1.0)


def test_one_mode_is_chosen_for_all_cells_of_a_dtype(workload: dict[str, Any]) -> None:
    # In the second cell eager is faster, but over both of them compiled is.
    assert best_modes(workload["cells"], "ttft")["float32", "kraken"] == "compiled"
    assert of_families(workload["cells"], "ttft")["kraken"] == {
        ("float32", 128, "unlimited"): [0.1, 0.2, 0.1],
        ("float32", 128, "1"): [0.2],
    }


def test_a_ratio_compares_the_times_of_one_repetition() -> None:
    # The machine was twice as slow in the second one; the ratio of the medians would be 1.25.
    assert paired([0.2, 0.5, 0.25], [0.1, 0.25, 0.2]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="shorter"):
        paired([0.2, 0.5], [0.1])


def test_the_slowest_rank_counts() -> None:
    class Ranks:
        def tell(self, do: str, **arguments: Any) -> list[Any]:
            one, other = {"tokens": [1], "ttft": 0.2, "tpot": 0.02}, {"tokens": [1], "ttft": 0.3, "tpot": 0.01}
            return [one | {"kernel": 0.1}, other | {"kernel": 0.2}]

    plan = Plan(WORKLOADS["tiny"], ("float32",), ("unlimited",), (16,), (), 1, 1, 2)
    nothing: Any = None
    cell = {"contender": "bound/eager", "ttft": [], "tpot": [], "kernel": []}
    session = _Session(plan, "float32", nothing, Ranks(), nothing, [], {}, Path())  # type: ignore[arg-type]
    session._measure(cell, 2)
    session._measure(cell, 1)
    assert (cell["ttft"], cell["tpot"], cell["kernel"]) == ([0.3, 0.3], [0.02], [0.2])


def test_several_runs_give_a_range(workload: dict[str, Any]) -> None:
    faster = copy.deepcopy(workload)
    for cell in faster["cells"]:
        if cell["contender"].startswith("kraken"):
            cell["ttft"] = [seconds / 2 for seconds in cell["ttft"]]
    lines = [" ".join(line.split()) for line in runs.lines_of([{"workloads": [workload]}, {"workloads": [faster]}])]
    mean = (1.5 * 0.9) ** 0.5
    assert f"TTFT standard / kraken float32 {mean * 2**0.5:.2f} {mean:.2f} {2 * mean:.2f}" in lines
    assert runs.lines_of([{"workloads": [workload]}, {"workloads": []}]) == []


def test_the_kernel_has_a_share_of_a_core() -> None:
    before = kernel_seconds()
    assert before >= 0
    assert kernel_seconds() >= before


def test_a_mode_that_lacks_a_cell_is_not_chosen(workload: dict[str, Any]) -> None:
    del workload["cells"][2]
    assert best_modes(workload["cells"], "ttft")["float32", "kraken"] == "eager"


def test_ratios_take_medians_and_name_their_worst_cell(workload: dict[str, Any]) -> None:
    found = {(one.aim.metric, one.aim.over, one.aim.under): one for one in ratios(workload)}
    ratio = found["ttft", "standard", "kraken"]
    assert ratio.mean == pytest.approx((1.5 * 0.9) ** 0.5)
    assert (ratio.low, ratio.low_at) == (pytest.approx(0.9), ("float32", 128, "1"))
    assert ratio.high == pytest.approx(1.5)
    assert ratio.holds is False
    assert ("ttft", "tp_plan", "kraken") not in found


def test_only_marked_cells_are_held_against_the_bound(workload: dict[str, Any]) -> None:
    fits = {place[2]: one.fits for place, one in windows(workload).items()}
    assert fits == {"unlimited": True, "1": False}
    ratio = next(one for one in ratios(workload) if one.aim.under == "bound" and one.aim.metric == "ttft")
    assert (ratio.low, ratio.high, ratio.holds) == (pytest.approx(1.0), pytest.approx(2.0), True)


def test_ratios_over_two_dtypes_are_also_taken_together(workload: dict[str, Any]) -> None:
    workload["cells"] += cells("bfloat16", "1", 128, {"standard/eager": [0.2], "kraken/eager": [0.1]})
    found = [one for one in ratios(workload) if (one.aim.metric, one.aim.over) == ("ttft", "standard")]
    assert [one.scope for one in found[:3]] == ["float32", "bfloat16", "all"]
    assert found[2].cells == 3
    assert found[2].mean == pytest.approx((1.5 * 0.9 * 2.0) ** (1 / 3))


def test_without_aims_there_are_ratios_and_no_verdicts(workload: dict[str, Any]) -> None:
    workload["has_aims"] = False
    found = ratios(workload)
    assert found
    assert {one.holds for one in found} == {None}


def test_window_arithmetic() -> None:
    found = window(SHAPE, "float32", 128, degree=2, gbits=1.0, bound_prefill=0.08)
    assert found.payload == 128 * 1024 * 4
    assert found.transfer == pytest.approx(found.payload * 8e-9)
    assert found.attention == pytest.approx(0.01 * attention_share(SHAPE, 128))
    # Three ranks send a third more than two do, each to its neighbours.
    assert window(SHAPE, "bfloat16", 128, 3, 1.0, 0.08).payload == pytest.approx(128 * 1024 * 2 * 4 / 3)


def test_attention_share_counts_projections_and_causal_scores() -> None:
    attention = 2 * 1024 * (2 * 1024 + 2 * 512) + 2 * 2 * 1024 * 512 / 2
    assert attention_share(SHAPE, 512) == pytest.approx(attention / (attention + 6 * 1024 * 2816))


def test_contenders_are_chosen_by_name_family_and_pattern() -> None:
    assert [one.name for one in contenders.chosen(["kraken", "tp_plan/eager"])] == [
        "tp_plan/eager",
        "kraken/eager",
        "kraken/compiled",
        "kraken/gloo",
    ]
    assert len(contenders.chosen(["*/compiled"])) == 12
    assert [one.split for one in contenders.chosen(["standard*/eager"])] == [False, True]
    assert {one.form for one in contenders.chosen(["standard", "standard+split"])} == {"standard"}
    with pytest.raises(ValueError, match="no contender matches 'krakn'"):
        contenders.chosen(["krakn"])


def test_everybody_comes_first_once() -> None:
    few = list(contenders.ALL[:3])
    assert {contenders.rotated(few, repetition)[0] for repetition in range(3)} == set(few)


def test_links() -> None:
    assert network.gbits("unlimited") is None
    assert network.gbits("2.5") == 2.5
    with pytest.raises(ValueError, match="above 0"):
        network.gbits("-1")


def test_a_prompt_is_the_same_on_every_rank() -> None:
    assert prompt_ids(100, 5).tolist() == prompt_ids(100, 5).tolist()


def test_the_report_says_what_holds_and_what_does_not(workload: dict[str, Any]) -> None:
    page = text({"machine": {"cpu": "a CPU", "cores": 2}, "versions": {"torch": "2.13"}, "workloads": [workload]})
    lines = page.splitlines()
    assert "WRONG, not timed: ladder/eager, float32, prompt 128: token 3 differs" in lines
    assert "problem: ladder float32: cannot be compiled: for a made-up reason" in lines
    ratio = next(line for line in lines if line.startswith("TTFT standard / kraken"))
    assert ratio.endswith("MISSED")
    assert "1.16" in ratio
    assert "0.90 (float32 128 1G)" in ratio
    assert any(line.startswith("kraken/compiled *") for line in lines)


def test_the_report_says_when_others_used_the_cores(workload: dict[str, Any]) -> None:
    for cell in workload["cells"]:
        cell["others"] = 0.3 if cell["link"] == "1" else 0.01
    page = text({"machine": {"cpu": "", "cores": 2}, "versions": {}, "workloads": [workload]})
    assert "DISTURBED: in 1 of 2 places" in page


def test_the_summary_is_json(workload: dict[str, Any]) -> None:
    found = json.loads(json.dumps(summary(workload)))
    assert found.keys() == {"medians_s", "modes", "windows", "hidden", "ratios"}
    assert found["ratios"][0]["low_at"] == {"dtype": "float32", "prompt": 128, "link": "1"}
    assert {"metric": "ttft", "dtype": "float32", "family": "kraken", "mode": "compiled"} in found["modes"]


def test_the_share_hidden_is_of_what_standard_loses(workload: dict[str, Any]) -> None:
    """Three cells: half of a loss, all of another, and one in which there was nothing to lose."""
    cell = {"dtype": "float32", "prompt": 512}
    times = {"10": (1.0, 0.9, 0.8), "2": (2.0, 1.0, 1.0), "unlimited": (0.7, 0.7, 0.7)}
    workload["cells"] = [
        cell | {"link": link, "contender": f"{family}/eager", "ttft": [value] * 3, "tpot": []}
        for link, values in times.items()
        for family, value in zip(("standard", "standard+split", "bound"), values)
    ]
    (found,) = hidden(workload)
    assert (found.metric, found.family) == ("ttft", "standard+split")
    assert list(found.shares.values()) == [pytest.approx(0.5), 1.0, None]
    assert found.together == pytest.approx(1.1 / 1.2)


def test_the_plot(workload: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    from ttft_parts.plot import plot

    plot({"workloads": [workload]}, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")


class NothingCompiles:
    """Ranks on which eager contenders can be prepared and compiled ones cannot."""

    def tell(self, do: str, **arguments: Any) -> list[Any]:
        assert do == "prepare"
        if arguments["contender"].endswith("/compiled"):
            raise CommandError("no compiler")
        return [{"tokens": [1], "seconds": 0.1}] * 2


def test_what_does_not_compile_is_replaced_by_itself_in_eager_mode(tmp_path: Path) -> None:
    chosen = contenders.chosen(["bound/compiled"])
    plan = Plan(WORKLOADS["tiny"], ("float32",), ("unlimited",), (16,), chosen, 1, 1, 1)
    data: dict[str, Any] = {"checks": []}
    nothing: Any = None
    session = _Session(plan, "float32", nothing, NothingCompiles(), nothing, list(chosen), data, tmp_path)  # type: ignore[arg-type]
    assert [one.name for one in session._prepare_all(16)] == ["bound/eager"]
    assert [(check["contender"], check["why"][:11]) for check in data["checks"]] == [
        ("bound/compiled", "no compiler"),
        ("bound/eager", "not checked"),
    ]


@pytest.mark.slow
def test_a_quick_run_over_loopback(tmp_path: Path) -> None:
    file = tmp_path / "ttft.json"
    options = [
        "--quick",
        "--network",
        "loopback",
        "--contenders",
        "tp_plan/eager,standard/eager,kraken/eager,bound/eager",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "ttft.py"), *options, "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(file.read_text())
    (workload,) = document["workloads"]
    assert workload["network"]["kind"] == "loopback"
    assert {check["contender"]: check["right"] for check in workload["checks"]} == {
        "tp_plan/eager": True,
        "standard/eager": True,
        "kraken/eager": True,
        "bound/eager": None,
    }
    assert {cell["contender"]: (len(cell["ttft"]), len(cell["tpot"])) for cell in workload["cells"]} == dict.fromkeys(
        ("tp_plan/eager", "standard/eager", "kraken/eager", "bound/eager"), (2, 2)
    )
    assert {"cpu", "cores"} <= document["machine"].keys()
    assert "TTFT standard / kraken" in done.stdout
    assert "loopback, unlimited link only" in done.stdout
