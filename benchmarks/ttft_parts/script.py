"""What the benchmarks share as scripts: their options, and the way from plans to a report."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from ttft_parts.contenders import Contender, chosen
from ttft_parts.machine import machine, versions
from ttft_parts.measure import Plan, run
from ttft_parts.network import gbits
from ttft_parts.ratios import Aim
from ttft_parts.report import summary, text


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--links", type=names, help="rates in Gbit/s, or unlimited; default: the workload's")
    made.add_argument("--prompts", type=names, help="sizes in tokens; default: the workload's")
    made.add_argument("--contenders", type=names, help="names, families or patterns; default: the workload's")
    made.add_argument("--repetitions", type=int, help="default: 6")
    made.add_argument("--tpot-repetitions", type=int, help="repetitions that generate all tokens; default: 3")
    made.add_argument("--new-tokens", type=int, help="default: the workload's, 32")
    made.add_argument("--network", choices=("auto", "namespaces", "loopback"), default="auto")
    made.add_argument("--quick", action="store_true", help="a tiny model and two repetitions: does everything work?")
    made.add_argument("--json", type=Path, help="write all samples and everything derived from them to this file")
    made.add_argument("--plot", type=Path, help="draw the medians into this file (needs matplotlib)")
    return made


def finish(made: argparse.ArgumentParser, options: argparse.Namespace, contenders: Sequence[Contender]) -> None:
    """Fill in the defaults, and refuse what cannot be."""
    options.repetitions = options.repetitions or (2 if options.quick else 6)
    options.tpot_repetitions = options.tpot_repetitions or min(3, options.repetitions)
    if options.plot and find_spec("matplotlib") is None:
        made.error("--plot needs matplotlib: pip install 'kraken-compiler[bench]'")
    try:
        chosen(list(options.contenders or ()), contenders)
        for link in options.links or ():
            gbits(link)
    except ValueError as error:
        made.error(str(error))


def execute(options: argparse.Namespace, plans: Iterable[Plan], aims: Sequence[Aim]) -> int:
    """Measure, print the report, and write what was asked for; returns the exit code."""
    # A namespace outlives the process that made it; a polite end must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, _leave)
    document: dict[str, Any] = {
        "schema": 1,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        "versions": versions(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "workloads": [],
    }
    began = time.monotonic()
    for plan in plans:
        with tempfile.TemporaryDirectory(prefix="kraken-bench-") as folder:
            found = run(plan, Path(folder))
        document["workloads"].append({**found, "summary": summary(found, aims)})
        # Also after each workload, so that an interrupted run leaves what it has.
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    document["seconds"] = round(time.monotonic() - began)
    print(text(document, aims))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from ttft_parts.plot import plot

        plot(document, options.plot)
    wrong = [check for found in document["workloads"] for check in found["checks"] if check["right"] is False]
    return int(bool(wrong) or not any(found["cells"] for found in document["workloads"]))


def names(value: str) -> tuple[str, ...]:
    """A list as it is written on a command line."""
    return tuple(filter(None, (name.strip() for name in value.split(","))))


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
