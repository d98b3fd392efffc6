"""How far off are predicted times? `kraken-probe` and `benchmarks/ttft.py` in the same hour, on the same hosts.

    python benchmarks/latency_accuracy.py [--dtype float32,bfloat16] [--links unlimited,10,2,1] [--prompts 128,512]

Two hosts of one core each, network namespaces joined by a link of a set rate (needs root and iproute2). First the ranks
measure products, attention and copies, and on every link sums; from nothing else the times of every form are predicted.
Then every form is timed. Prints the error of every cell, the mean absolute error of TTFT and of `standard` / x, and in
how many cells the forms come in the predicted order. Forms count as equal within 3 %, and where the repetitions do not
all say the same one is faster: forms take turns, so times of one repetition were measured beside each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts import contenders
from ttft_parts.contenders import BOUND
from ttft_parts.measure import Plan, run
from ttft_parts.network import UNLIMITED
from ttft_parts.probed_hosts import probed
from ttft_parts.report import table
from ttft_parts.script import names
from ttft_parts.workloads import WORKLOADS, Workload

from kraken_compiler.capture import capture
from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.predict import Load, Predictor, RunGraphs
from kraken_compiler.options.dtypes import dtype_named
from kraken_compiler.passes.lower import lower_split, split_source

FAMILIES = ("standard", "standard+split", "kraken", "ladder", "delayed", BOUND)
NOISE = 0.03
"""Times that differ by less count as equal."""
Cell = tuple[str, str, int, str]
"""Element type, link, prompt, contender."""
Times = tuple[float, float]
"""TTFT and TPOT, in seconds."""
Samples = dict[Cell, list[float]]
"""TTFT in seconds, one a repetition."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="llama", choices=WORKLOADS)
    parser.add_argument("--dtype", type=names, default=("float32", "bfloat16"))
    parser.add_argument("--links", type=names, default=(UNLIMITED, "10", "2", "1"), help="rates in Gbit/s")
    parser.add_argument("--prompts", type=names, default=("128", "512"), help="sizes in tokens")
    parser.add_argument("--modes", type=names, default=("eager", "compiled"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures of the machine, the cells and the times there")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    prompts = tuple(map(int, options.prompts))
    machines = {
        link: Machine.model_validate({"name": f"two hosts, {link}", **figures})
        for link, figures in probed(options.links, options.dtype, workload.degree)
    }
    plan = Plan(
        workload=workload,
        dtypes=options.dtype,
        links=options.links,
        prompts=prompts,
        contenders=tuple(one for one in contenders.ALL if one.family in FAMILIES and one.mode in options.modes),
        repetitions=options.repetitions,
        tpot_repetitions=min(2, options.repetitions),
        new_tokens=workload.new_tokens,
    )
    with tempfile.TemporaryDirectory(prefix="kraken-accuracy-") as folder:
        found = run(plan, Path(folder))
    with tempfile.TemporaryDirectory(prefix="kraken-accuracy-") as folder:
        predicted = _predicted(workload, plan, machines, Path(folder))
    measured = {
        (cell["dtype"], cell["link"], cell["prompt"], cell["contender"]): (median(cell["ttft"]), median(cell["tpot"]))
        for cell in found["cells"]
        if cell["ttft"] and cell["tpot"]
    }
    samples = {
        (cell["dtype"], cell["link"], cell["prompt"], cell["contender"]): cell["ttft"] for cell in found["cells"]
    }
    print(report(predicted, measured, samples))
    if options.json:
        document = {
            "machines": {link: machine.model_dump() for link, machine in machines.items()},
            "cells": [[*cell, predicted[cell], measured[cell], samples[cell]] for cell in measured],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _predicted(workload: Workload, plan: Plan, machines: dict[str, Machine], work: Path) -> dict[Cell, Times]:
    """TTFT and TPOT of every cell."""
    workload.write(work / "model")
    found: dict[Cell, Times] = {}
    for dtype in plan.dtypes:
        split = split_source(capture(work / "model", dtype=dtype_named(dtype)).program, workload.degree)
        forms = {one.form for one in plan.contenders if one.form is not None}
        programs = {form: RunGraphs.of(lower_split(split, form, overlap="tokens")) for form in forms}
        for link, machine in machines.items():
            predictors = {mode: Predictor(machine, fused=mode == "compiled") for mode in ("eager", "compiled")}
            for prompt in plan.prompts:
                for one in plan.contenders:
                    load = Load(prompt, 1, plan.new_tokens)
                    options = {"halves": one.split, "silent": one.family == BOUND}
                    prediction = predictors[one.mode].predict(programs[one.form], load, **options)
                    found[dtype, link, prompt, one.name] = (prediction.ttft, prediction.tpot)
    return found


def report(predicted: dict[Cell, Times], measured: dict[Cell, Times], samples: Samples) -> str:
    """The cells, and what is asked of them."""
    rows = []
    for cell, (ttft, tpot) in measured.items():
        expected, expected_step = predicted[cell]
        dtype, link, prompt, name = cell
        rows.append(
            (dtype, link, str(prompt), name, *_beside(expected, ttft), *_beside(expected_step, tpot)),
        )
    header = ("dtype", "link", "prompt", "contender", "ttft", "measured", "error", "tpot", "measured", "error")
    errors = {
        what: fmean(abs(predicted[cell][number] / times[number] - 1) for cell, times in measured.items())
        for number, what in enumerate(("TTFT", "TPOT"))
    }
    ratios = _ratio_errors(predicted, measured)
    right, places = _orders(predicted, measured, samples)
    return "\n".join(
        [
            *table(header, rows),
            "",
            *(f"mean absolute error of {what}: {error:.1%}" for what, error in errors.items()),
            *(f"mean absolute error of TTFT standard / {family}: {error:.1%}" for family, error in ratios.items()),
            f"the forms come in the predicted order in {right} of {places} cells",
        ]
    )


def _beside(expected: float, measured: float) -> tuple[str, str, str]:
    return f"{expected * 1e3:.2f}", f"{measured * 1e3:.2f}", f"{expected / measured - 1:+.0%}"


def _ratio_errors(predicted: dict[Cell, Times], measured: dict[Cell, Times]) -> dict[str, float]:
    """Mean absolute errors of the ratios of standard's TTFT to those of the others, in the same mode."""
    errors: dict[str, list[float]] = {}
    for (dtype, link, prompt, name), (ttft, _) in measured.items():
        family, _, mode = name.partition("/")
        base = (dtype, link, prompt, f"standard/{mode}")
        if family == "standard" or base not in measured:
            continue
        expected = predicted[base][0] / predicted[dtype, link, prompt, name][0]
        errors.setdefault(family, []).append(abs(expected / (measured[base][0] / ttft) - 1))
    return {family: fmean(values) for family, values in errors.items()}


def _orders(predicted: dict[Cell, Times], measured: dict[Cell, Times], samples: Samples) -> tuple[int, int]:
    """In how many places no two forms come in another order than predicted, each in its faster mode; of how many."""
    places: dict[tuple[str, str, int], dict[str, list[Cell]]] = {}
    for cell in measured:
        places.setdefault(cell[:3], {}).setdefault(cell[3].partition("/")[0], []).append(cell)
    right = 0
    for families in places.values():
        forms = [
            (min(predicted[cell][0] for cell in cells), min(cells, key=lambda cell: measured[cell][0]))
            for cells in families.values()
        ]
        right += all(
            _is_equal(expected, expected_other)
            or _is_equal(measured[one][0], measured[other][0])
            or _faster(samples[one], samples[other]) in (None, expected < expected_other)
            for (expected, one), (expected_other, other) in combinations(forms, 2)
        )
    return right, len(places)


def _faster(one: list[float], other: list[float]) -> bool | None:
    """Whether the one is faster in every repetition; None if the repetitions do not agree."""
    found = {first < second for first, second in zip(one, other, strict=True)}
    return found.pop() if len(found) == 1 else None


def _is_equal(one: float, other: float) -> bool:
    return abs(one / other - 1) < NOISE


if __name__ == "__main__":
    sys.exit(main())
