"""Ranks that are threads of one process, for measuring and testing: nothing is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kraken_compiler.errors import RankFailedError

Array = npt.NDArray[Any]
Result = TypeVar("Result")


@dataclass
class Meeting:
    """Where the threads leave their parts.

    Attributes:
        degree: How many threads there are.
        parts: Number of a collective -> rank -> its part.
        taken: How many ranks have taken a collective's parts; the last one clears them away.
        failed: True once a thread has ended with an error: nobody waits for it.
    """

    degree: int
    parts: dict[int, dict[int, Array]] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    failed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def leave(self, number: int, rank: int, part: Array) -> None:
        """Leave a part, which must not change any more."""
        with self.changed:
            self.parts.setdefault(number, {})[rank] = part
            self.changed.notify_all()

    def take(self, number: int) -> list[Array]:
        """All parts of a collective, rank 0's first.

        Raises:
            RankFailedError: Another thread has failed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.failed or len(self.parts.get(number, ())) == self.degree)
            if len(self.parts.get(number, ())) < self.degree:
                raise RankFailedError("another rank of this process failed")
            parts = [self.parts[number][rank] for rank in range(self.degree)]
            self.taken[number] = self.taken.get(number, 0) + 1
            if self.taken[number] == self.degree:
                del self.parts[number], self.taken[number]
            return parts

    def fail(self) -> None:
        """Let nobody wait any longer."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()


class ThreadCollectives:
    """One thread's end, as `backends.onnx_ort.device_program.ArrayCollectives` asks for it.

    Attributes:
        rank: Number of the thread.
        degree: How many there are.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.degree = rank, meeting.degree
        self._meeting, self._next = meeting, 0

    @classmethod
    def alone(cls, degree: int) -> ThreadCollectives:
        """Rank 0 of several whose peers never come; good for everything but collectives."""
        return cls(Meeting(degree), 0)

    def start(self, x: Array) -> int:
        """Begin the sum of `x` over the threads."""
        number, self._next = self._next, self._next + 1
        self._meeting.leave(number, self.rank, x.copy())
        return number

    def wait(self, handle: int, out: Array | None = None) -> Array:
        """The finished sum, added in the order of the ranks."""
        first, *rest = self._meeting.take(handle)
        total = first.copy()
        for part in rest:
            total += part
        if out is not None:
            out[...] = total
        return total if out is None else out

    def all_gather(self, x: Array, axis: int) -> Array:
        """The parts, one behind the other."""
        return np.concatenate(self._meeting.take(self.start(x)), axis=axis)


def together(degree: int, act: Callable[[ThreadCollectives], Result]) -> list[Result]:
    """Call `act` in one thread per rank; returns what they return, rank 0 first.

    Raises:
        Exception: What the first rank that failed raised.
    """
    meeting = Meeting(degree)
    return in_threads(meeting, lambda rank: act(ThreadCollectives(meeting, rank)))


def in_threads(meeting: Meeting, act: Callable[[int], Result]) -> list[Result]:
    """The same for ranks that have met before."""
    failures: list[BaseException] = []

    def guarded(rank: int) -> Result:
        try:
            return act(rank)
        except BaseException as error:
            failures.append(error)
            meeting.fail()
            raise

    with ThreadPoolExecutor(meeting.degree) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(meeting.degree)]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
