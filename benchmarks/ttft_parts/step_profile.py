"""Where the time of decode steps goes on one rank: in the calls of the communicator, idle, or in everything else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ("start", "wait")
_IRQ, _SOFTIRQ = 5, 6
_IDLE = 3


def profiled(step: Callable[[], object], sums: type, steps: int) -> dict[str, float]:
    """Run steps, and measure them.

    Args:
        step: Runs one.
        sums: The class whose methods `start` and `wait` begin and end a sum.
        steps: How many.

    Returns:
        Milliseconds of a step in all, of its thread on the core, and outside of the sums (`rest`); sums per step;
        microseconds of a call of each kind; shares of the core that were idle or spent in interrupts, such as the
        network stack's.
    """
    with _timed(sums) as seconds:
        cpu, core, began = time.thread_time(), _core_ticks(), time.perf_counter()
        for _ in range(steps):
            step()
        whole = (time.perf_counter() - began) / steps
        cpu, ticks = time.thread_time() - cpu, [after - before for after, before in zip(_core_ticks(), core)]
    in_calls = sum(map(sum, seconds.values())) / steps
    per_call = {f"{name} us": 1e6 * sum(of_one) / max(1, len(of_one)) for name, of_one in seconds.items()}
    return {
        "step ms": 1e3 * whole,
        "cpu ms": 1e3 * cpu / steps,
        "rest ms": 1e3 * (whole - in_calls),
        "sums": len(seconds["start"]) / steps,
        **per_call,
        "idle": ticks[_IDLE] / max(1, sum(ticks)),
        "interrupts": (ticks[_IRQ] + ticks[_SOFTIRQ]) / max(1, sum(ticks)),
    }


@contextmanager
def _timed(sums: type) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call while this lasts."""
    seconds: dict[str, list[float]] = {name: [] for name in CALLS}
    originals = {name: getattr(sums, name) for name in CALLS}

    def timed(name: str) -> Callable[..., Any]:
        original, durations = originals[name], seconds[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = original(*args, **kwargs)
            durations.append(time.perf_counter() - began)
            return result

        return call

    try:
        for name in CALLS:
            setattr(sums, name, timed(name))
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(sums, name, original)


def _core_ticks() -> list[int]:
    """What this process's first core has done so far (proc(5), /proc/stat), in ticks."""
    core = min(os.sched_getaffinity(0))
    with open("/proc/stat", encoding="ascii") as lines:
        fields = next(line for line in lines if line.startswith(f"cpu{core} ")).split()
    return [int(field) for field in fields[1:9]]
