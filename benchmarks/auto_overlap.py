"""Does `--overlap auto` ever make a prefill slower than reading it at once?

    python benchmarks/auto_overlap.py [--links unlimited,10,2,1] [--prompts 128,512] [--backend torch] [--compile]

Two hosts of one core each, network namespaces joined by a link of a set rate (needs root and iproute2), the model of
`benchmarks/ttft.py` in standard form. On every link the ranks measure from how many tokens on two halves are faster, as
`kraken-run` does before its first prompt; then every prompt is read at once and as that says, by turns.
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
from ttft_parts.report import table
from ttft_parts.script import names
from ttft_parts.workloads import WORKLOADS, prompt_ids

WORKLOAD, CONTENDER = WORKLOADS["llama"], "standard/eager"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", type=names, default=["unlimited", "10", "2", "1"], help="rates in Gbit/s")
    parser.add_argument("--prompts", type=names, default=["128", "512"], help="sizes in tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--compile", action="store_true", help="compile the lanes, on torch")
    parser.add_argument("--repetitions", type=int, default=8)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="kraken-auto-") as folder, network(WORKLOAD.degree, "auto") as where:
        work = Path(folder)
        shape = WORKLOAD.write(work / "model")
        artifacts = compiled(
            [contenders.named(CONTENDER)], work / "model", options.dtype, work, WORKLOAD.degree, ("torch", "onnx")
        )
        run_options = {"compile": True} if options.compile else {}
        settings = {"artifact": str(*artifacts.values()), "backend": options.backend, "options": run_options}
        with started(where, WORKLOAD.degree, work / "ranks", settings, "ttft_parts.auto_rank") as ranks:
            for link in options.links:
                where.set_link(link)
                for prompt in map(int, options.prompts):
                    (ids,) = prompt_ids(shape["vocabulary"], prompt).tolist()
                    of_ranks = ranks.tell(
                        "time", ids=ids, directory=folder, setting=link, repetitions=options.repetitions
                    )
                    rows.append((str(prompt), link, *_figures(of_ranks)))
                    print(*rows[-1], flush=True)
            where.set_link(UNLIMITED)
    print("\n".join(table(("prompt", "link", "halves from", "at once", "auto", "auto / at once"), rows)))
    return 0


def _figures(of_ranks: list[dict[str, object]]) -> tuple[str, ...]:
    """The threshold, the slower rank's medians in ms, and the median of the ratios by turns."""
    whole, auto = (
        [max(pair) for pair in zip(*(one[name] for one in of_ranks), strict=True)]  # type: ignore[call-overload]
        for name in ("whole", "auto")
    )
    ratio = statistics.median(second / first for first, second in zip(whole, auto, strict=True))
    medians = (f"{statistics.median(seconds) * 1e3:.0f}" for seconds in (whole, auto))
    return f"{of_ranks[0]['threshold']}", *medians, f"{ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
