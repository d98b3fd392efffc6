"""What `benchmarks/onnx.py` adds to `benchmarks/ttft.py`, and one small run of it over loopback."""

from __future__ import annotations

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

from onnx_parts.aims import AIMS  # noqa: E402
from ttft_parts import contenders  # noqa: E402
from ttft_parts.ratios import Ratio, ratios  # noqa: E402
from ttft_parts.report import text  # noqa: E402

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


def cells(link: str, prompt: int, **seconds: float) -> list[dict[str, Any]]:
    place = {"dtype": "float32", "link": link, "prompt": prompt, "others": 0.0}
    return [{**place, "contender": f"{name}/ort", "ttft": [value], "tpot": []} for name, value in seconds.items()]


@pytest.fixture
def workload() -> dict[str, Any]:
    """Two links and two prompts; the single process was measured once."""
    link = {"gbits": 9.0, "all_reduce": {"4096": 1e-4}}
    return {
        "name": "llama",
        "degree": 2,
        "has_aims": True,
        "shape": SHAPE,
        "network": {"kind": "namespaces", "note": ""},
        "pinned": True,
        "new_tokens": 32,
        "moved_by": "our messages",
        "links": {"float32": {"unlimited": link, "1": link}},
        "checks": [],
        "cells": [
            *cells("unlimited", 128, standard=0.12, kraken=0.1, bound=0.1),
            *cells("1", 128, standard=0.18, kraken=0.1, bound=0.1),
            *cells("unlimited", 512, single=0.6, standard=0.36, kraken=0.3, bound=0.2),
            *cells("1", 512, standard=0.36, kraken=0.3, bound=0.2),
        ],
        "problems": [],
    }


def found(workload: dict[str, Any]) -> dict[tuple[str, str, int | None], Ratio]:
    return {(one.aim.over, one.aim.under, one.aim.prompt): one for one in ratios(workload, AIMS)}


def test_aims_count_the_cells_of_their_prompt(workload: dict[str, Any]) -> None:
    short, long = (found(workload)["standard", "kraken", prompt] for prompt in (128, 512))
    assert (short.cells, short.holds) == (2, True)
    assert short.mean == pytest.approx((1.2 * 1.8) ** 0.5)
    assert (long.mean, long.holds) == (pytest.approx(1.2), False)


def test_kraken_may_be_little_slower_than_no_communication(workload: dict[str, Any]) -> None:
    ratio = found(workload)["kraken", "bound", None]
    assert ratio.mean == pytest.approx(1.5**0.5)
    assert ratio.holds is False
    for cell in workload["cells"]:
        if cell["prompt"] == 512 and cell["contender"] == "bound/ort":
            cell["ttft"] = [0.25]
    assert found(workload)["kraken", "bound", None].holds is True


def test_the_single_process_is_compared_where_it_was_measured(workload: dict[str, Any]) -> None:
    ratio = found(workload)["single", "standard", None]
    assert (ratio.cells, ratio.holds, ratio.low_at) == (1, True, ("float32", 512, "unlimited"))
    assert ratio.mean == pytest.approx(0.6 / 0.36)


def test_without_aims_every_ratio_is_there_once(workload: dict[str, Any]) -> None:
    workload["has_aims"] = False
    pairs = [(one.aim.metric, one.aim.over, one.aim.under) for one in ratios(workload, AIMS)]
    assert pairs[:2] == [("ttft", "standard", "kraken"), ("ttft", "kraken", "bound")]
    assert len(pairs) == len(set(pairs))


def test_the_report_names_the_prompt_of_an_aim(workload: dict[str, Any]) -> None:
    page = text({"machine": {"cpu": "", "cores": 2}, "versions": {}, "workloads": [workload]}, AIMS).splitlines()
    (line,) = [line for line in page if line.startswith("TTFT standard / kraken, prompt 512")]
    assert ">= 1.25" in line
    assert line.endswith("MISSED")
    assert "links as seen through our messages, float32" in page


def test_only_the_single_process_runs_alone() -> None:
    forms = ["standard"] * 3 + ["kraken"] * 3
    assert [one.form for one in contenders.ONNX] == forms
    assert [one.artifact for one in contenders.ONNX] == ["single", *forms[1:]]
    assert [one.family for one in contenders.ONNX if one.split] == ["standard+split", "kraken+split"]
    assert [one.alone for one in contenders.ONNX] == [True, *[False] * 5]
    assert contenders.named("single/ort").checkable


@pytest.mark.slow
def test_a_quick_run_over_loopback(tmp_path: Path) -> None:
    file = tmp_path / "onnx.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "onnx.py"), "--quick", "--network", "loopback", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (workload,) = json.loads(file.read_text())["workloads"]
    assert workload["problems"] == []
    assert {check["contender"]: check["right"] for check in workload["checks"]} == {
        one.name: True if one.checkable else None for one in contenders.ONNX
    }
    tokens = {check["contender"]: check["tokens"] for check in workload["checks"]}
    assert tokens["standard/ort"] == tokens["single/ort"]
    assert {cell["contender"]: (len(cell["ttft"]), len(cell["tpot"])) for cell in workload["cells"]} == dict.fromkeys(
        [one.name for one in contenders.ONNX], (2, 2)
    )
    assert "TTFT standard / kraken" in done.stdout
    assert "links as seen through our messages, float32" in done.stdout
