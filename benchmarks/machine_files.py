"""Writes the ready-made machines of `kraken_compiler/latency/machines`: GPUs as published, CPU hosts as measured here.

    python benchmarks/machine_files.py                 # the GPUs
    python benchmarks/machine_files.py --hosts 1,10    # two hosts of one core each, by their link's Gbit/s (root)

Peaks and bandwidths are the data sheets', all-reduces those of AIConfigurator's public measurement database (2026). How
much of a peak a product reaches follows from its 128 x 128 tiles: fewer than the device has multiprocessors leave some
of them idle. `kraken-probe` measures the same on a machine at hand, which is always better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

# The packages come first: this folder also has an `onnx`.
sys.path.append(sys.path.pop(0))

from ttft_parts.probed_hosts import probed
from ttft_parts.script import names

from kraken_compiler.latency.probe import DTYPES, machine_toml

HOSTS = 2
FOLDER = Path(str(files("kraken_compiler.latency").joinpath("machines")))

ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)
COLUMNS = (64, 256, 1024, 4096, 16384, 65536)
TILE = 128
"""Columns of a tile, and its rows where there are as many."""
FEWER_ROWS = (16, 64)
"""Rows of smaller tiles."""
SPLIT, SPLIT_OF_FEW = 2, 8
"""In how many blocks the inside of a product is computed apart, and where its rows fill no tile."""
BEST = 0.8
"""Of the peak, of large products."""
QUERIES = (1, 128, 512, 2048, 8192)
ATTENTION = (0.01, 0.1, 0.25, 0.45, 0.55)
"""Of the peak, of causal flash attention by queries."""


@dataclass(frozen=True)
class Device:
    """A data sheet."""

    file: str
    name: str
    peak: float
    peak32: float
    multiprocessors: int
    bandwidth: float
    cache: float
    all_reduces: str


@dataclass(frozen=True)
class Reduces:
    """All-reduces of a number of ranks: microseconds by bytes."""

    ranks: int
    library: str
    microseconds: dict[int, float]


def _points(*values: float | None) -> dict[int, float]:
    sizes = (512, 2**16, 2**20, 2**24, 2**29)
    return {size: value for size, value in zip(sizes, values) if value is not None}


CUSTOM = "a serving engine's own kernel in a CUDA graph (vLLM), NCCL where it has no figure"
ALL_REDUCES = {
    "a100": (
        Reduces(2, "NCCL 2.27", _points(10, 13, 40.8, 128, 2781)),
        Reduces(4, CUSTOM, _points(5.2, 6.6, 18.3, 182, 3716)),
        Reduces(8, CUSTOM, _points(5.7, 8.4, 21.7, 214, 4223)),
    ),
    "a100, NCCL": (
        Reduces(2, "NCCL 2.27", _points(10, 13, 40.8, 128, 2781)),
        Reduces(4, "NCCL 2.27", _points(14.5, 17.8, 29.8, 183.5, 3716)),
        Reduces(8, "NCCL 2.27", _points(22.6, 28.1, 38.9, 216.5, 4226)),
    ),
    "h100": (
        Reduces(2, "NCCL 2.29", _points(6.2, 7.3, 14.7, 82, 1686)),
        Reduces(4, "NCCL 2.29", _points(9.5, 11.3, 18.1, 99, 2300)),
        Reduces(8, CUSTOM, _points(4.7, 6.4, 15.0, 92, 2111)),
    ),
    "l40s": (
        Reduces(2, "NCCL", _points(7.7, 12.6, 74.8, 850)),
        Reduces(4, "NCCL", _points(11.9, 32.2, 268, 4922)),
        Reduces(8, "NCCL", _points(22.6, 164.5, 863, 19376)),
    ),
}
DEVICES = (
    Device("a100-40gb-sxm", "A100-40GB SXM with NVSwitch", 312e12, 19.5e12, 108, 1.555e12, 40e6, "a100"),
    Device(
        "a100-40gb-sxm-nccl",
        "A100-40GB SXM with NVSwitch, NCCL alone",
        312e12,
        19.5e12,
        108,
        1.555e12,
        40e6,
        "a100, NCCL",
    ),
    Device("a100-80gb-sxm", "A100-80GB SXM with NVSwitch", 312e12, 19.5e12, 108, 2.039e12, 40e6, "a100"),
    Device("h100-sxm", "H100 SXM with NVSwitch", 989e12, 66.9e12, 132, 3.35e12, 50e6, "h100"),
    Device("h200-sxm", "H200 SXM with NVSwitch", 989e12, 66.9e12, 132, 4.8e12, 50e6, "h100"),
    Device("l40s-pcie", "L40S on PCIe 4.0 x16, no NVLink", 362e12, 91.6e12, 142, 0.864e12, 96e6, "l40s"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=names, help="measure two hosts here instead, with links of these rates")
    rates = parser.parse_args().hosts
    if rates:
        write_hosts(rates)
        return
    for device in DEVICES:
        (FOLDER / f"{device.file}.toml").write_text(toml(device))
        print(f"{device.file}.toml")


def write_hosts(rates: Sequence[str]) -> None:
    """Measure two hosts of one core each, and write a machine for every rate of their link, in Gbit/s."""
    for rate, figures in probed(rates, DTYPES, HOSTS):
        name = f"two CPU hosts of one core each, {rate} Gbit/s"
        (FOLDER / f"two-cpu-hosts-{rate}gbit.toml").write_text(machine_toml(name, figures))


def toml(device: Device) -> str:
    """A machine file."""
    half = _computing(device, device.peak, "", ("bfloat16", "float16"))
    full = _computing(device, device.peak32, " without tensor cores, torch's default", ("float32",))
    reduces = "".join(_all_reduce(reduces) for reduces in ALL_REDUCES[device.all_reduces])
    return f"""# Written by benchmarks/machine_files.py from published figures.
name = "{device.name}"

[memory]
source = "{device.bandwidth / 1e12:g} TB/s by the data sheet, nine tenths of it; twice that out of the level 2 cache"
bytes = {_list((1e4, device.cache / 2, device.cache * 2))}
rate = {_list((device.bandwidth * 2, device.bandwidth * 2, device.bandwidth * 0.9))}

[launch]
source = "3 to 5 us a kernel without a CUDA graph; about 1.5 us between the kernels of one"
eager = 4e-6
compiled = 1.5e-6
step = 5e-5
ahead = true
{half}{full}{reduces}"""


def _computing(device: Device, peak: float, how: str, dtypes: Sequence[str]) -> str:
    """The tables of products and of attention for element types of a peak."""
    rates = ",\n    ".join(_list([_rate(device, peak, rows, columns) for columns in COLUMNS]) for rows in ROWS)
    of_peak = f"{peak / 1e12:g} TFLOP/s{how}"
    names = json.dumps([*dtypes])
    return f"""
[[products]]
source = "{BEST:.0%} of the data sheet's {of_peak}, times t / (t + {device.multiprocessors // 2}) for t tiles"
dtypes = {names}
rows = {_list(ROWS)}
columns = {_list(COLUMNS)}
rate = [
    {rates},
]

[[attention]]
source = "of {of_peak}: causal flash attention"
dtypes = {names}
queries = {_list(QUERIES)}
rate = {_list([share * peak for share in ATTENTION])}
"""


def _rate(device: Device, peak: float, rows: int, columns: int) -> float:
    """FLOP/s of a product; rows that do not fill a tile are computed in vain."""
    height = next((few for few in FEWER_ROWS if rows <= few), TILE)
    split = SPLIT if height == TILE else SPLIT_OF_FEW
    tiles = -(-rows // height) * max(1.0, columns / TILE) * split
    return peak * BEST * tiles / (tiles + device.multiprocessors / 2) * min(1.0, rows / height)


def _all_reduce(reduces: Reduces) -> str:
    return f"""
[[all_reduce]]
source = "AIConfigurator's public measurement database, 2026, {reduces.library}"
ranks = {reduces.ranks}
bytes = {_list(reduces.microseconds)}
seconds = {_list([value * 1e-6 for value in reduces.microseconds.values()])}
busy = {_list([0.0] * len(reduces.microseconds))}
"""


def _list(values: object) -> str:
    assert isinstance(values, (list, tuple, dict))
    return f"[{', '.join(f'{float(value):.4g}' for value in values)}]"


if __name__ == "__main__":
    main()
