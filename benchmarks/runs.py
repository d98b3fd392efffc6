"""What several runs of `make bench` or `make bench-onnx` say together: each ratio, and its range over the runs.

    python benchmarks/runs.py RUN.json RUN.json ...

A run is a day or a machine of its own: what differs between them is more than what differs between repetitions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The packages come first: this folder also has an `onnx`.
if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))

from ttft_parts.ratios import AIMS, geomean, hidden, ratios
from ttft_parts.report import table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="what --json wrote")
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().runs]
    print("\n".join(lines_of(documents)))
    return 0


def lines_of(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ratios and shares of every workload that all runs have, as text."""
    lines = []
    for workload in documents[0]["workloads"]:
        of_runs = [_named(document, workload["name"]) for document in documents]
        present = [one for one in of_runs if one is not None]
        if len(present) == len(documents):
            lines += ["", f"== {workload['name']}, {len(present)} runs", *_ratios(present), "", *_hidden(present)]
    return lines


def _named(document: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((workload for workload in document["workloads"] if workload["name"] == name), None)


def _ratios(workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[tuple[str, str], list[float]] = {}
    for workload in workloads:
        for ratio in ratios(workload, AIMS):
            found.setdefault((ratio.aim.name, ratio.scope), []).append(ratio.mean)
    rows = [(*name, f"{geomean(values):.2f}", *_range(values, "{:.2f}")) for name, values in found.items()]
    return table(("ratio", "dtype", "geomean", "lowest run", "highest run"), rows)


def _hidden(workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, list[float]] = {}
    for workload in workloads:
        for one in hidden(workload):
            found.setdefault(f"{one.metric.upper()} {one.family}", []).append(one.together)
    rows = [(name, *_range(values, "{:.0%}")) for name, values in found.items()]
    return table(("share of the communication hidden", "lowest run", "highest run"), rows)


def _range(values: Iterable[float], form: str) -> tuple[str, str]:
    ordered = sorted(values)
    return form.format(ordered[0]), form.format(ordered[-1])


if __name__ == "__main__":
    sys.exit(main())
