"""A picture of one prefill, at once and in two halves: what a rank computes, and which sums are on their way meanwhile.

    python benchmarks/timeline.py docs/overlap.png [--prompt 512] [--link 1]

One run on two hosts of one core each, network namespaces joined by a link of a set rate (needs root, iproute2 and
matplotlib), on ONNX Runtime, whose runs tell when every stage and collective began and ended. The model is that of
`benchmarks/onnx.py`. A sum counts as on its way from the end of its start to the end of its wait.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts import contenders
from ttft_parts.measure import compiled
from ttft_parts.network import Network, network
from ttft_parts.ranks import started
from ttft_parts.workloads import WORKLOADS, prompt_ids

WORKLOAD, DTYPE = WORKLOADS["llama"], "float32"
SHOWN = ("standard/ort", "standard+split/ort")
TITLES = ("at once", "in two halves")
COLORS = ("#4c78a8", "#f2a65a")
LAYERS = (2, 5)
"""The part that is drawn: from which reduce pair to which."""

Events = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--link", default="1", help="Gbit/s, or unlimited")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kraken-timeline-") as work, network(WORKLOAD.degree, "auto") as where:
        traces = _traces(Path(work), where, options.prompt, options.link)
    for title, events in zip(TITLES, traces):
        waited = sum(event["ended"] - event["began"] for event in events if event["kind"] == "AllReduceWait")
        whole = events[-1]["ended"] - events[0]["began"]
        print(f"{title}: {whole * 1e3:.0f} ms, of which rank 0 waits {waited * 1e3:.0f} ms")
    _draw(traces, options.picture)
    return 0


def _traces(work: Path, where: Network, prompt: int, link: str) -> list[Events]:
    shape = WORKLOAD.write(work / "model")
    ones = [contenders.named(name) for name in SHOWN]
    artifacts = compiled(ones, work / "model", DTYPE, work, WORKLOAD.degree, ("torch", "onnx"))
    settings = {"model": "", "artifacts": {name: str(path) for name, path in artifacts.items()}, "dtype": DTYPE}
    with started(where, WORKLOAD.degree, work / "ranks", settings, "onnx_parts.rank_main") as ranks:
        where.set_link("unlimited")
        ranks.tell("start_prompt", ids=prompt_ids(shape["vocabulary"], prompt).tolist())
        for name in SHOWN:
            ranks.tell("prepare", contender=name, new_tokens=2, logits_file=str(work / "logits.npy"))
        where.set_link(link)
        # The middle one of several, for a picture of what is usual.
        runs = [[ranks.tell("trace", contender=name)[0] for name in SHOWN] for _ in range(5)]
        where.set_link("unlimited")
    return [sorted(of_one, key=lambda events: events[-1]["ended"] - events[0]["began"])[2] for of_one in zip(*runs)]


def _draw(traces: list[Events], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(traces), 1, figsize=(9, 4.6), layout="constrained", sharex=True)
    for axis, title, events in zip(axes, TITLES, traces):
        parts = sorted({event["part"] for event in events})
        begins, ends = _window(events)
        rows = [f"rank 0 computes {'AB'[part]}" if len(parts) > 1 else "rank 0 computes" for part in parts]
        rows += [f"sum of {'AB'[part]} on its way" if len(parts) > 1 else "sum on its way" for part in parts]
        for event in events:
            part, began, ended = event["part"], event["began"] - begins, event["ended"] - begins
            if event["kind"] == "stage":
                axis.barh(part, ended - began, left=began, height=0.7, color=COLORS[part])
        for part in parts:
            for began, ended, waited in _sums([event for event in events if event["part"] == part]):
                row = len(parts) + part
                axis.barh(row, ended - began, left=began - begins, height=0.35, color=COLORS[part], alpha=0.5)
                axis.barh(row, ended - waited, left=waited - begins, height=0.35, color="#e45756")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlim(0, ends - begins)
        axis.invert_yaxis()
        axis.set_title(f"{title} (red: the rank waits)", fontsize=9, loc="left")
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def _window(events: Events) -> tuple[float, float]:
    """The seconds between two starts of the first part."""
    starts = [event["ended"] for event in events if event["kind"] == "AllReduceStart" and event["part"] == 0]
    return starts[2 * LAYERS[0]], starts[2 * LAYERS[1]]


def _sums(events: Events) -> list[tuple[float, float, float]]:
    """When every sum began, was there, and was waited for from: of one part, whose sums are awaited in their order."""
    starts = [event["ended"] for event in events if event["kind"] == "AllReduceStart"]
    waits = [event for event in events if event["kind"] == "AllReduceWait"]
    return [(start, wait["ended"], wait["began"]) for start, wait in zip(starts, waits)]


if __name__ == "__main__":
    sys.exit(main())
