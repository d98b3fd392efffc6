"""Time to the first token and per following token, beside what else there is: `make bench`.

    python benchmarks/ttft.py [--quick] [--workload llama,smollm2] [--dtype ...] [--links ...] [--prompts ...]

Hosts are network namespaces joined by links of a set rate, one core each (needs root and iproute2; without, everything
runs over loopback and only the unlimited link is measured). All contenders live in the same rank processes; within each
repetition every one of them runs once, in rotating order, behind a barrier, so that whatever else the machine does hits
all of them alike. Medians over the repetitions are reported, and the median ratio of two times of one repetition.

    TTFT    from the call to the first token as a Python int on the last rank; that all ranks have the same token is
            compared after the clock has stopped
    TPOT    mean time of each following token of the same generation on the slowest rank, greedy, through the
            contender's own KV cache

Nothing is timed that is wrong: see `ttft_parts/check.py`. What is compared with what is in `ttft_parts/contenders.py`,
what was aimed at in `ttft_parts/ratios.py`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from ttft_parts import contenders, network
from ttft_parts.machine import machine, versions
from ttft_parts.measure import Plan, run
from ttft_parts.report import summary, text
from ttft_parts.workloads import WORKLOADS, packaged_smollm2_missing


def main() -> int:
    options = _options()
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
    for plan in _plans(options):
        with tempfile.TemporaryDirectory(prefix="kraken-ttft-") as folder:
            found = run(plan, Path(folder))
        document["workloads"].append({**found, "summary": summary(found)})
        # Also after each workload, so that an interrupted run leaves what it has.
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    document["seconds"] = round(time.monotonic() - began)
    print(text(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from ttft_parts.plot import plot

        plot(document, options.plot)
    wrong = [check for found in document["workloads"] for check in found["checks"] if check["right"] is False]
    return int(bool(wrong) or not any(found["cells"] for found in document["workloads"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", type=_names, help=f"of {', '.join(WORKLOADS)}; default: llama,smollm2")
    parser.add_argument("--dtype", type=_names, help="float32,bfloat16; default: the workload's")
    parser.add_argument("--links", type=_names, help="rates in Gbit/s, or unlimited; default: the workload's")
    parser.add_argument("--prompts", type=_names, help="sizes in tokens; default: the workload's")
    parser.add_argument("--contenders", type=_names, help="names, families or patterns; default: the workload's")
    parser.add_argument("--repetitions", type=int, help="default: 6")
    parser.add_argument("--tpot-repetitions", type=int, help="repetitions that generate all tokens; default: 3")
    parser.add_argument("--new-tokens", type=int, help="default: the workload's, 32")
    parser.add_argument("--network", choices=("auto", "namespaces", "loopback"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two repetitions: does everything work?")
    parser.add_argument("--json", type=Path, help="write all samples and everything derived from them to this file")
    parser.add_argument("--plot", type=Path, help="draw the medians into this file (needs matplotlib)")
    options = parser.parse_args()
    options.workload = options.workload or (("tiny",) if options.quick else ("llama", "smollm2"))
    options.repetitions = options.repetitions or (2 if options.quick else 6)
    options.tpot_repetitions = options.tpot_repetitions or min(3, options.repetitions)
    unknown = [name for name in options.workload if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload '{unknown[0]}'; there are {', '.join(WORKLOADS)}")
    if options.plot and not _has("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'kraken-compiler[bench]'")
    try:
        contenders.chosen(list(options.contenders or ()))
        for link in options.links or ():
            network.gbits(link)
    except ValueError as error:
        parser.error(str(error))
    return options


def _plans(options: argparse.Namespace) -> list[Plan]:
    plans = []
    with network.network(2, options.network) as probe:
        can_limit = probe.can_limit
    for name in options.workload:
        workload = WORKLOADS[name]
        missing = packaged_smollm2_missing() if name == "smollm2" else None
        if missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
            continue
        links = tuple(options.links or workload.links)
        plans.append(
            Plan(
                workload=workload,
                dtypes=tuple(options.dtype or workload.dtypes),
                links=links if can_limit else (network.UNLIMITED,),
                prompts=tuple(map(int, options.prompts or workload.prompts)),
                contenders=contenders.chosen(list(options.contenders or workload.contenders)),
                repetitions=options.repetitions,
                tpot_repetitions=options.tpot_repetitions,
                new_tokens=options.new_tokens or workload.new_tokens,
                network=options.network,
            )
        )
    return plans


def _names(value: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in value.split(","))))


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
