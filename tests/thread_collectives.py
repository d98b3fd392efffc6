"""Collectives between threads of one process, for device programs that are run together in a test."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kraken_compiler.backends.onnx_ort.device_program import Array


@dataclass
class Meeting:
    """Where the threads leave their parts."""

    degree: int
    parts: dict[int, dict[int, Array]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def leave(self, number: int, rank: int, part: Array) -> None:
        with self.changed:
            self.parts.setdefault(number, {})[rank] = part
            self.changed.notify_all()

    def take(self, number: int) -> list[Array]:
        with self.changed:
            complete = self.changed.wait_for(lambda: len(self.parts.get(number, ())) == self.degree, timeout=60)
            assert complete, f"only ranks {sorted(self.parts.get(number, ()))} reached collective {number}"
            return [self.parts[number][rank] for rank in range(self.degree)]


class ThreadCollectives:
    """One thread's end."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.degree = rank, meeting.degree
        self._meeting, self._next = meeting, 0

    @classmethod
    def alone(cls, degree: int) -> ThreadCollectives:
        """Rank 0 of several whose peers never come; good for everything but collectives."""
        return cls(Meeting(degree), 0)

    def start(self, x: Array) -> int:
        number, self._next = self._next, self._next + 1
        self._meeting.leave(number, self.rank, x.copy())
        return number

    def wait(self, handle: int, out: Array | None = None) -> Array:
        first, *rest = self._meeting.take(handle)
        total = first.copy()
        for part in rest:
            total += part
        if out is not None:
            out[...] = total
        return total if out is None else out

    def all_gather(self, x: Array, axis: int) -> Array:
        return np.concatenate(self._meeting.take(self.start(x)), axis=axis)


def together(degree: int, act: Any) -> list[Any]:
    """Call `act(collectives)` in one thread per rank; returns what they return, rank 0 first."""
    meeting = Meeting(degree)
    with ThreadPoolExecutor(degree) as pool:
        futures = [pool.submit(act, ThreadCollectives(meeting, rank)) for rank in range(degree)]
        return [future.result(timeout=120) for future in futures]
