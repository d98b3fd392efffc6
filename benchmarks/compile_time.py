"""How long a plan takes, pass by pass: `make bench-compile`.

Capture and all passes, those of the KV cache too, as `kraken-compile --plan` runs them, on Llama shapes of 70B and 405B
parameters; no weights are read, none exist. Every model has a process of its own, so that the peak of its resident
memory (imports included) is its own. Seconds are of the processor by default: a plan runs on one core, and what else
the machine does then counts less; `--wall` prints those of the clock.

The smaller models have the same layers in other numbers: the last column is what one more layer costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9
SHAPES: dict[str, dict[str, int]] = {
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126},
}
LIMITS_S = {"70b": 60.0, "405b": 120.0}
LIMITS_GB = {"70b": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 1.0], help="of the layers; 1 is all")
    parser.add_argument("--degree", type=int, default=8)
    parser.add_argument("--form", default="kraken")
    parser.add_argument("--wall", action="store_true", help="print seconds of the clock")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one), options.degree, options.form)))
        return 0
    results = []
    for model in options.models:
        for fraction in sorted(options.fractions):
            layers = max(2, round(SHAPES[model]["num_hidden_layers"] * fraction))
            result = measured(model, layers, options.degree, options.form)
            results.append({"model": model, "whole": fraction == 1.0, **result})
    for model in options.models:
        print("\n".join(table([result for result in results if result["model"] == model], options.wall)), "\n")
    print(json.dumps(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results) + "\n")
    return int(any(beyond_limits(result, options.wall) for result in results))


def measured(model: str, layers: int, degree: int, form: str) -> dict[str, Any]:
    """Plan a model in a process of its own."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[model],
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(prefix="kraken-plan-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        command = [sys.executable, __file__, "--one", folder, "--degree", str(degree), "--form", form]
        print(f"{model}: {layers} layers, degree {degree}, {form}", file=sys.stderr, flush=True)
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{model}: the plan ended with exit code {finished.returncode}")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return {"layers": layers, **result}


def measure(folder: Path, degree: int, form: str) -> dict[str, Any]:
    """Capture and lower; returns seconds by step, in order."""
    from kraken_compiler.capture import capture
    from kraken_compiler.passes.lower import lower

    marks: list[tuple[str, float, float]] = []

    def begin(step: str) -> None:
        marks.append((step, time.perf_counter(), time.process_time()))

    begin("capture")
    captured = capture(str(folder), require_weights=False)
    program, history = lower(captured.program, degree, form, progress=begin)
    begin("")
    steps = [
        {"step": step, "wall_s": after[1] - wall, "cpu_s": after[2] - cpu}
        for (step, wall, cpu), after in itertools.pairwise(marks)
    ]
    return {
        "nodes": history[-1].nodes,
        "cached": program.cached is not None,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB,
        "steps": steps,
    }


def total(result: dict[str, Any], wall: bool) -> float:
    return sum(step["wall_s" if wall else "cpu_s"] for step in result["steps"])


def beyond_limits(result: dict[str, Any], wall: bool) -> bool:
    if not result["whole"]:
        return False
    model = result["model"]
    return total(result, wall) > LIMITS_S[model] or result["peak_rss_gb"] > LIMITS_GB.get(model, float("inf"))


def table(results: list[dict[str, Any]], wall: bool) -> list[str]:
    """One model: a row for every step, a column for every number of layers."""
    what = "wall_s" if wall else "cpu_s"
    fewest, most = results[0], results[-1]
    more = most["layers"] - fewest["layers"]

    def row(name: str, values: list[float]) -> str:
        slope = f"{1000 * (values[-1] - values[0]) / more:14.1f}" if more else " " * 14
        return f"{name:26}" + "".join(f"{value:14.2f}" for value in values) + slope

    heads = "".join(f"{result['layers']:>7} layers" for result in results)
    lines = [f"{results[0]['model'] + ', ' + what:26}{heads}{'ms a layer' if more else '':>14}"]
    for number, step in enumerate(most["steps"]):
        lines.append(row(step["step"], [result["steps"][number][what] for result in results]))
    lines.append(row("all", [total(result, wall) for result in results]))
    lines.append(f"{'peak memory, GB':26}" + "".join(f"{result['peak_rss_gb']:14.2f}" for result in results))
    return lines


if __name__ == "__main__":
    sys.exit(main())
