"""Time to the first token and per following token of the ONNX backend: `make bench-onnx`.

    python benchmarks/onnx.py [--quick] [--links ...] [--prompts ...]

The hosts, the clock, the rotation of the contenders and the checks before it are those of `benchmarks/ttft.py`, which
says what they are. The ranks run the device files on stock ONNX Runtime, in float32, one core each, and import no
torch; torch runs in the parent only, for the answers that the contenders' tokens and logits are held against.

    standard, kraken   our forms on two devices; +split: prefills in two halves of the tokens
    bound              kraken with a communicator that sends nothing: wrong numbers, the time none could beat
    single             standard at degree 1: one process of ONNX Runtime on one core, on the longest prompt

What is aimed at is printed beside the ratios: kraken beside standard over the four links, and beside the bound; and
that two devices in standard form beat the single process.
"""

from __future__ import annotations

import argparse
import sys

# The packages come first: among them is one of this file's name.
sys.path.append(sys.path.pop(0))

from onnx_parts.aims import AIMS
from ttft_parts import contenders, network, script
from ttft_parts.measure import Plan
from ttft_parts.workloads import WORKLOADS


def main() -> int:
    options = _options()
    return script.execute(options, [_plan(options)], AIMS)


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0])
    options = parser.parse_args()
    script.finish(parser, options, contenders.ONNX)
    return options


def _plan(options: argparse.Namespace) -> Plan:
    workload = WORKLOADS["tiny" if options.quick else "llama"]
    with network.network(2, options.network) as probe:
        links = tuple(options.links or workload.links) if probe.can_limit else (network.UNLIMITED,)
    return Plan(
        workload=workload,
        dtypes=("float32",),
        links=links,
        prompts=tuple(map(int, options.prompts or workload.prompts)),
        contenders=contenders.chosen(list(options.contenders or ("*",)), contenders.ONNX),
        repetitions=options.repetitions,
        tpot_repetitions=options.tpot_repetitions,
        new_tokens=options.new_tokens or workload.new_tokens,
        network=options.network,
        backends=("torch", "onnx"),
        rank_module="onnx_parts.rank_main",
        moved_by="our messages",
    )


if __name__ == "__main__":
    sys.exit(main())
