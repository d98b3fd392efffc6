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
import sys

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts import contenders, network, script
from ttft_parts.measure import Plan
from ttft_parts.ratios import AIMS
from ttft_parts.workloads import WORKLOADS, packaged_smollm2_missing


def main() -> int:
    options = _options()
    return script.execute(options, _plans(options), AIMS)


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0])
    parser.add_argument("--workload", type=script.names, help=f"of {', '.join(WORKLOADS)}; default: llama,smollm2")
    parser.add_argument("--dtype", type=script.names, help="float32,bfloat16; default: the workload's")
    options = parser.parse_args()
    options.workload = options.workload or (("tiny",) if options.quick else ("llama", "smollm2"))
    unknown = [name for name in options.workload if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload '{unknown[0]}'; there are {', '.join(WORKLOADS)}")
    script.finish(parser, options, contenders.ALL)
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


if __name__ == "__main__":
    sys.exit(main())
