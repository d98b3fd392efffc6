"""Measures what a machine does, on the ranks that will run there: one device, or one share of the cores, each.

All ranks measure at the same time, as they compute at the same time: memory is shared on one host. Weights are taken by
turns, so that they come from where those of a model come from. Rank 0's figures count.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.join import communicator_of, rank_device
from kraken_compiler.ranks.communicators.packed import can_pack, packed_product
from kraken_compiler.ranks.session import Ranks

DTYPES = ("float32", "bfloat16")

_SECONDS, _LEAST, _MOST = 0.06, 3, 200
"""A figure is the median of so many seconds of repetitions, at least and at most so many."""
_MOVED = tuple(2**power for power in range(14, 29, 2))
_ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
_SIDES = (128, 256, 512, 1024, 2048, 4096)
"""Of square weights."""
_MOST_FLOPS = 1e11
"""Larger products are as fast as the largest of those."""
_COLD_BYTES = 1 << 27
"""Weights that are taken by turns are so many bytes together."""
_QUERIES, _HEADS, _HEAD, _PAST = (1, 16, 128, 512, 2048), 8, 64, 1024
_PAYLOADS = tuple(2**power for power in (9, 12, 14, 16, 18, 20, 21, 22, 24, 26))
_PAIRS, _HIDING = 9, 256
"""So often, at most, a sum is hidden behind products of so many rows and columns."""
_LAUNCHES = 2000

Figures = dict[str, Any]
Note = Callable[[int, int], None]
"""Is told how many figures of how many are there."""


def probe(ranks: Ranks, dtypes: Sequence[str], note: Note) -> Figures:
    """Measure; all ranks must call it together.

    Args:
        ranks: This rank.
        dtypes: Element types of products and attentions, as torch calls them.
        note: Is told how far it is.

    Returns:
        A machine as `Machine` reads it, but for its name.
    """
    tasks = _tasks(ranks, note, figure_count(dtypes, ranks.degree))
    source = tasks.source
    figures: Figures = {
        "memory": {"source": source, "bytes": list(_MOVED), "rate": [tasks.moving(moved) for moved in _MOVED]},
        "launch": {"source": source, **tasks.launching(), "step": 0.0},  # what runs programs measures that
        "products": [_products(tasks, name, source, compiled) for name in dtypes for compiled in (False, True)],
        "attention": [_attention(tasks, name, source) for name in dtypes],
    }
    return {**figures, "all_reduce": _sums(tasks)}


def probe_sums(ranks: Ranks) -> list[Figures]:
    """Measure all-reduces alone, as where nothing but the link has changed; all ranks must call it together."""
    return _sums(_tasks(ranks, lambda done, total: None, len(_PAYLOADS)))


def _tasks(ranks: Ranks, note: Note, total: int) -> _Tasks:
    device = rank_device(None, ranks.place)
    ranks.status.computes_here = device.type == "cpu"
    return _Tasks(ranks, device, note, total)


def _sums(tasks: _Tasks) -> list[Figures]:
    ranks = tasks.ranks
    if ranks.degree == 1:
        return []
    communicator = communicator_of(ranks, tasks.device)
    times = [tasks.reducing(communicator, payload) for payload in _PAYLOADS]
    figures = {"bytes": list(_PAYLOADS), "seconds": [one[0] for one in times], "busy": [one[1] for one in times]}
    return [{"source": tasks.source, "ranks": ranks.degree, **figures}]


def device_name(device: torch.device) -> str:
    """What a rank computes on, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads each"


def figure_count(dtypes: Sequence[str], degree: int) -> int:
    """How many figures a probe measures."""
    of_a_type = 2 * len(_ROWS) * len(_SIDES) + len(_QUERIES)
    return len(_MOVED) + 1 + of_a_type * len(dtypes) + (len(_PAYLOADS) if degree > 1 else 0)


def _products(tasks: _Tasks, name: str, source: str, compiled: bool) -> Figures:
    """Products as a graph calls them, or as compiled code does: on CPUs with weights that were packed for it."""
    dtype = getattr(torch, name)
    rate = [[tasks.multiplying(rows, side, dtype, compiled) for side in _SIDES] for rows in _ROWS]
    return {
        "source": source,
        "dtypes": [name],
        "includes_memory": True,
        "compiled": compiled,
        "rows": list(_ROWS),
        "weights": [side * side for side in _SIDES],
        "rate": rate,
    }


def _attention(tasks: _Tasks, name: str, source: str) -> Figures:
    dtype = getattr(torch, name)
    rates = [tasks.attending(queries, dtype) for queries in _QUERIES]
    return {
        "source": source,
        "dtypes": [name],
        "includes_memory": True,
        "queries": list(_QUERIES),
        "rate": rates,
    }


class _Tasks:
    """Measures one figure after the other."""

    def __init__(self, ranks: Ranks, device: torch.device, note: Note, total: int) -> None:
        self.ranks, self.device, self._note, self._total = ranks, device, note, total
        self._done = 0

    @property
    def source(self) -> str:
        """Where the figures are from, for the record."""
        return f"kraken-probe on {self.ranks.degree} ranks, {device_name(self.device)}, torch {torch.__version__}"

    def moving(self, moved: int) -> float:
        """Bytes a second of a sum of two tensors into a third."""
        count = max(1, moved // 12)
        left, right, out = (torch.ones(count, device=self.device) for _ in range(3))
        return moved / self._seconds([lambda: torch.add(left, right, out=out)])

    def launching(self) -> dict[str, float]:
        """Seconds of the host for an operator of next to no numbers, called by name and as compiled code calls it."""
        x, y, out = (torch.ones(8, device=self.device) for _ in range(3))
        call, direct = torch.ops.aten.add.Tensor, torch.ops.aten.add.out

        def named() -> None:
            for _ in range(_LAUNCHES):
                call(x, y)

        def compiled() -> None:
            for _ in range(_LAUNCHES):
                direct(x, y, out=out)

        eager = self._seconds([named], counts=False) / _LAUNCHES
        return {"eager": eager, "compiled": self._seconds([compiled]) / _LAUNCHES}

    def multiplying(self, rows: int, side: int, dtype: torch.dtype, compiled: bool) -> float:
        """FLOP/s of a product with a square weight."""
        rows = max(1, min(rows, int(_MOST_FLOPS / (2 * side * side))))
        copies = min(256, max(2, _COLD_BYTES // (side * side * dtype.itemsize)))
        x = torch.randn(rows, side, device=self.device).to(dtype)
        weights = [torch.randn(side, side, device=self.device).to(dtype) for _ in range(copies)]
        return 2.0 * rows * side * side / self._seconds([_linear(x, weight, compiled) for weight in weights])

    def attending(self, queries: int, dtype: torch.dtype) -> float:
        """FLOP/s of causal attention to what stands before; of a single query, to a past."""
        keys = queries if queries > 1 else _PAST
        q, k, v = (
            torch.randn(1, _HEADS, length, _HEAD, device=self.device).to(dtype) for length in (queries, keys, keys)
        )
        seen = (queries + 1) / 2 if queries > 1 else keys
        flops = 4.0 * _HEADS * queries * seen * _HEAD
        return flops / self._seconds([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)])

    def reducing(self, communicator: Communicator, payload: int) -> tuple[float, float]:
        """Seconds of a sum that is awaited at once, and those by which it delays products that hide it."""
        part = torch.ones(payload // 4, device=self.device)

        def at_once() -> None:
            communicator.wait(communicator.start(part))

        self.ranks.barrier()
        whole = self._agreed(self._seconds([at_once], agreed=True))
        products = self._products_of(2 * whole)

        def hidden() -> None:
            handle = communicator.start(part)
            products()
            communicator.wait(handle)

        delays = []
        for _ in range(max(_LEAST, min(_PAIRS, round(1 / whole)))):
            self.ranks.barrier()
            alone = self._timed(products)
            self.ranks.barrier()
            delays.append(self._timed(hidden) - alone)
        return whole, min(whole, max(0.0, self._agreed(statistics.median(delays))))

    def _products_of(self, seconds: float) -> Callable[[], None]:
        """Products that take at least so long."""
        x, weight = torch.randn(_HIDING, _HIDING, device=self.device), torch.randn(_HIDING, _HIDING, device=self.device)
        once = min(self._timed(lambda: F.linear(x, weight)) for _ in range(_LEAST))
        count = math.ceil(self._agreed(seconds / once)) + 1

        def products() -> None:
            for _ in range(count):
                F.linear(x, weight)

        return products

    def _seconds(self, runs: Sequence[Callable[[], Any]], *, counts: bool = True, agreed: bool = False) -> float:
        """The median time of one of the runs, which are taken by turns.

        Args:
            runs: What is timed.
            counts: It is a figure of its own.
            agreed: All ranks must run it equally often.
        """
        self.ranks.barrier()
        first = self._timed(runs[0])
        again = self._timed(runs[-1])
        expected = min(first, again)
        if agreed:
            expected = self._agreed(expected)
        repetitions = max(_LEAST, min(_MOST, math.ceil(_SECONDS / max(expected, 1e-7))))
        times = [self._timed(runs[number % len(runs)]) for number in range(repetitions)]
        if counts:
            self._done += 1
            self._note(self._done, self._total)
        return statistics.median(times)

    def _timed(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _agreed(self, value: float) -> float:
        """Rank 0's value."""
        return float(self.ranks.broadcast(repr(value).encode() if self.ranks.rank == 0 else None).decode())


def _linear(x: Tensor, weight: Tensor, compiled: bool) -> Callable[[], Tensor]:
    if compiled and can_pack(weight):
        multiply = packed_product(weight)
        return lambda: multiply(x)
    return lambda: F.linear(x, weight)


def machine_toml(name: str, figures: Figures) -> str:
    """A machine as a TOML file."""
    lines = [f"name = {_value(name)}"]
    for table in ("memory", "launch"):
        lines += ["", f"[{table}]", *_entries(figures[table])]
    for table in ("products", "attention", "all_reduce"):
        for one in figures[table]:
            lines += ["", f"[[{table}]]", *_entries(one)]
    return "\n".join(lines) + "\n"


def _entries(table: Figures) -> Iterable[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + "".join(f"    {_value(row)},\n" for row in value) + "]"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return f"{value:.4g}" if isinstance(value, float) else str(value)
