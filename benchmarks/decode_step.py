"""Where a decode step's time goes, to the microsecond: in begun and awaited sums, idle, or in everything else.

    python benchmarks/decode_step.py [--links unlimited,1] [--repetitions 10]

Two hosts of one core each, network namespaces joined by a link of a set rate (needs root and iproute2), torch, eager,
the model of `benchmarks/ttft.py`. The contenders take turns; what is printed is the median over the turns, the slower
rank's step, and both ranks' parts of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts import contenders
from ttft_parts.measure import compiled
from ttft_parts.network import UNLIMITED, network
from ttft_parts.ranks import started
from ttft_parts.script import names
from ttft_parts.workloads import WORKLOADS, prompt_ids

WORKLOAD, DTYPE = WORKLOADS["llama"], "float32"
SHOWN = ("standard/eager", "kraken/eager", "bound/eager")
PROMPT, STEPS = 128, 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", type=names, default=["unlimited", "1"], help="rates in Gbit/s, or unlimited")
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kraken-decode-") as folder, network(WORKLOAD.degree, "auto") as where:
        work = Path(folder)
        shape = WORKLOAD.write(work / "model")
        ones = [contenders.named(name) for name in SHOWN]
        artifacts = compiled(ones, work / "model", DTYPE, work, WORKLOAD.degree, ("torch", "onnx"))
        paths = {name: str(path) for name, path in artifacts.items()}
        settings = {"model": str(work / "model"), "artifacts": paths, "dtype": DTYPE}
        with started(where, WORKLOAD.degree, work / "ranks", settings) as ranks:
            where.set_link(UNLIMITED)
            ranks.tell("start_prompt", ids=prompt_ids(shape["vocabulary"], PROMPT).tolist())
            for name in SHOWN:
                ranks.tell("prepare", contender=name, new_tokens=STEPS + 2, logits_file=str(work / "logits.npy"))
            for link in options.links:
                where.set_link(link)
                turns = [
                    [ranks.tell("profile", contender=name, steps=STEPS) for name in SHOWN]
                    for _ in range(options.repetitions)
                ]
                for name, profiles in zip(SHOWN, zip(*turns)):
                    _print(link, name, profiles)
            where.set_link(UNLIMITED)
    return 0


def _print(link: str, name: str, profiles: tuple[list[dict[str, float]], ...]) -> None:
    step = statistics.median(max(rank["step ms"] for rank in ranks) for ranks in profiles)
    parts = []
    for key in profiles[0][0]:
        of_ranks = [statistics.median(ranks[rank][key] for ranks in profiles) for rank in range(len(profiles[0]))]
        parts.append(f"{key} {' '.join(f'{value:.3g}' for value in of_ranks)}")
    print(f"{link:10} {name:16} step {step:.2f} ms; ranks: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
