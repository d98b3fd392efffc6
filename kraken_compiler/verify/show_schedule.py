"""The schedule of a program, and the runs of ranks by it: as plain values, and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kraken_compiler.ir.schedule import RanNode, RanWindow, Window
from kraken_compiler.text import table

Runs = Sequence[Sequence[RanWindow]]
"""The windows of every rank's run, rank 0 first; empty if none told."""


def schedule_entries(windows: Sequence[Window], runs: Runs) -> list[dict[str, Any]]:
    """Every reduce as plain values.

    Args:
        windows: The schedule.
        runs: What ranks ran.

    Returns:
        One entry per reduce. `devices` in it is a list with, for every rank, when the start was, the products and
        attentions that ran until the wait, and how long the wait took, all in microseconds.
    """
    return [
        {**asdict(window), "devices": [run[number].to_dict() for run in runs]} for number, window in enumerate(windows)
    ]


def hiding(windows: Sequence[Window]) -> str:
    """How many reduces have something to hide behind, in words."""
    promised = [window for window in windows if window.promised]
    if not promised:
        return "none hidden"
    fewest = min(len(window.gemms) for window in promised)
    return f"{len(promised)} hidden, each behind at least {fewest} matrix products"


def schedule_table(windows: Sequence[Window], runs: Runs, run_size: tuple[int, int]) -> list[str]:
    """A row for every reduce: its start, what runs while the sum is on its way, and its wait.

    Where ranks told what they ran, the row is that of the one that waited longest, with times.

    Args:
        windows: The schedule.
        runs: What ranks ran.
        run_size: Batch and sequence size of that run.
    """
    if not runs:
        rows = [(str(one.reduce), one.start, ", ".join(one.gemms) or "nothing", one.wait) for one in windows]
        return table(("reduce", "start", "matrix products and attentions", "wait"), rows)
    batch, sequence = run_size
    slowest = [max(enumerate(of_reduce), key=lambda entry: entry[1].wait_us) for of_reduce in zip(*runs, strict=True)]
    header = ("reduce", "device", "start", "of module", "matrix products and attentions", "together", "wait")
    return [
        f"one run of batch {batch} x {sequence}, in us, of each reduce the device that waited longest:",
        *table(header, (_row(device, one) for device, one in slowest)),
    ]


def _row(device: int, one: RanWindow) -> tuple[str, ...]:
    module = _common_module([node.name for node in one.products])
    nodes = [_product_text(node, module) for node in one.products] + [
        f"{node.op} {node.microseconds:.0f}" for node in one.attentions
    ]
    return (
        str(one.window.reduce),
        str(device),
        f"{one.start_us:.0f}",
        module,
        ", ".join(nodes) or "nothing",
        f"{one.hiding_us:.0f}",
        f"{one.wait_us:.0f}",
    )


def _common_module(names: Sequence[str]) -> str:
    """The innermost module that all nodes are of, as far as their names say."""
    paths = [_path(name)[:-1] for name in names]
    prefix = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


def _product_text(node: RanNode, module: str) -> str:
    name = ".".join(_path(node.name)).removeprefix(f"{module}.")
    return f"{name} {node.microseconds:.0f}"


def _path(name: str) -> list[str]:
    """`layers.1.mlp.up_proj/MatMul` without what the exporter adds."""
    return name.partition("/")[0].split(".")
