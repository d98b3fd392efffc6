"""What an embedding of which a lane has its own rows costs in time and saves in memory, beside a whole one.

    python benchmarks/embedding.py [--tied] [--form standard] [--links unlimited,10,1] [--prompts 128,512]

Two hosts of one core each, network namespaces joined by a link of a set rate (needs root and iproute2; `--network
loopback` needs neither), the model of `benchmarks/ttft.py`, its head tied to its embedding or not. Both artifacts are
open in the same ranks and take turns; what is printed are medians over the turns of the slower rank, and the median
ratio of two turns beside each other, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts.network import UNLIMITED, network
from ttft_parts.ranks import started
from ttft_parts.report import table
from ttft_parts.script import names
from ttft_parts.workloads import WORKLOADS, prompt_ids

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.text import format_bytes

CHOICES = ("whole", "split")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="llama", choices=list(WORKLOADS))
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--form", default="standard")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--links", type=names, default=["unlimited"], help="rates in Gbit/s, or unlimited")
    parser.add_argument("--prompts", type=names, default=["128", "512"], help="sizes in tokens")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--network", default="auto", help="namespaces, loopback or auto")
    options = parser.parse_args()
    workload, rows = WORKLOADS[options.workload], []
    with (
        tempfile.TemporaryDirectory(prefix="kraken-embedding-") as folder,
        network(workload.degree, options.network) as where,
    ):
        work = Path(folder)
        vocabulary = workload.write(work / "model")["vocabulary"]
        if options.tied:
            _tie(work / "model")
        artifacts = {choice: _compile(work, choice, options, workload.degree) for choice in CHOICES}
        settings = {"artifacts": artifacts, "backend": options.backend}
        with started(where, workload.degree, work / "ranks", settings, "ttft_parts.embedding_rank") as ranks:
            for link in options.links if where.can_limit else [UNLIMITED]:
                where.set_link(link)
                for prompt in map(int, options.prompts):
                    (ids,) = prompt_ids(vocabulary, prompt).tolist()
                    of_ranks = ranks.tell("time", ids=ids, steps=options.steps, repetitions=options.repetitions)
                    for what in ("first", "step"):
                        rows.append((link, str(prompt), what, *_figures(of_ranks, what)))
                        print(*rows[-1], flush=True)
            where.set_link(UNLIMITED)
    header = ("link", "prompt", "token", "whole, ms", "split, ms", "split / whole", "lowest", "highest")
    print("\n".join(table(header, rows)))
    return 0


def _tie(model: Path) -> None:
    """Let a saved model's head be its embedding."""
    from transformers import AutoModelForCausalLM

    tied = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=True)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(model)


def _compile(work: Path, choice: str, options: argparse.Namespace, degree: int) -> str:
    target = work / f"{choice}.kraken"
    backends = (options.backend,)
    compile_model(
        work / "model", target, degree=degree, form=options.form, backends=backends, embedding=choice, verify=False
    )
    (lane, *_) = open_artifact(target, verify=False).report()["lanes"]
    print(f"{choice}: a lane has {lane['parameters']:,} parameters, {format_bytes(lane['bytes'])}", flush=True)
    return str(target)


def _figures(of_ranks: list[dict[str, dict[str, list[float]]]], what: str) -> tuple[str, ...]:
    """Medians in ms of the slower rank, and ratios turn by turn."""
    whole, split = (
        [max(pair) for pair in zip(*(one[choice][what] for one in of_ranks), strict=True)] for choice in CHOICES
    )
    ratios = [second / first for first, second in zip(whole, split, strict=True)]
    medians = (f"{statistics.median(seconds) * 1e3:.2f}" for seconds in (whole, split))
    return (*medians, f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}")


if __name__ == "__main__":
    sys.exit(main())
