"""Notices that ranks hang, finds out which one, and ends the run.

A rank hangs that neither gets something done nor computes, while none of its peers computes: it may wait for them. How
long a computation takes is nobody's business here; a prompt may be long.

A rank that waits for a hanging peer looks exactly as idle as the peer. What tells them apart: a stopped process sends
no heartbeat, and a process that hangs elsewhere is not inside the graph or a collective when asked for its stack.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kraken_compiler.ranks.heartbeat import Heartbeat, read_heartbeats, read_stack

_POLL_SECONDS = 0.2
_STALE_SECONDS = 1.5
_START_SECONDS = 90.0
_ANSWER_SECONDS = 5.0
_LULL_SECONDS = 10.0
"""The longest that a computing rank may get no processor on a crowded machine."""
_WAITING_PLACES = ("/zmq/", "ranks/communicators/")


@dataclass(frozen=True)
class Verdict:
    """The rank that hangs, and the reason.

    Attributes:
        rank: The one to blame.
        reason: One sentence.
        stack: Its stack, innermost call first, "" if it gave none.
    """

    rank: int
    reason: str
    stack: str


class Watchdog:
    """Watches the ranks of one run from a thread of its own.

    Attributes:
        verdict: Set when a rank was found hanging and killed.
    """

    def __init__(self, directory: Path, degree: int, timeout: float) -> None:
        self.verdict: Verdict | None = None
        self._directory = directory
        self._degree = degree
        self._timeout = timeout
        self._start_time = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kraken-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            beats = read_heartbeats(self._directory)
            late_ranks = [rank for rank in range(self._degree) if self._is_late(beats.get(rank))]
            if late_ranks and not any(map(self._computes, beats.values())):
                self.verdict = self._judge(beats, late_ranks)
                for rank in {self.verdict.rank, *late_ranks}:
                    _signal(beats.get(rank), signal.SIGKILL)
                return

    def _is_late(self, beat: Heartbeat | None) -> bool:
        now = time.time()
        if beat is None:
            return now - self._start_time > self._timeout + _START_SECONDS
        if beat.done:
            return False
        return now - max(beat.progress, beat.computed) > self._timeout + beat.extra

    def _computes(self, beat: Heartbeat) -> bool:
        """True if a rank was seen to compute just now."""
        return not beat.done and time.time() - beat.computed < min(self._timeout, _LULL_SECONDS)

    def _judge(self, beats: dict[int, Heartbeat], late_ranks: list[int]) -> Verdict:
        silent_ranks = [rank for rank in range(self._degree) if rank not in beats]
        if silent_ranks:
            return Verdict(silent_ranks[0], "never started", "")
        now = time.time()
        stopped_ranks = [
            rank for rank, beat in sorted(beats.items()) if not beat.done and now - beat.alive > _STALE_SECONDS
        ]
        for beat in beats.values():
            _signal(beat, signal.SIGUSR1)
            # A stopped process answers only once it goes on; it is killed right after.
            _signal(beat, signal.SIGCONT)
        stacks = self._stacks(beats)
        ranks_elsewhere = [rank for rank in late_ranks if stacks[rank] and not _is_waiting(stacks[rank], beats[rank])]
        rank = (stopped_ranks or ranks_elsewhere or late_ranks)[0]
        state = "stopped answering" if rank in stopped_ranks else "made no progress"
        if not stopped_ranks and not ranks_elsewhere and len(late_ranks) > 1:
            state = "and its peers made no progress"
        return Verdict(
            rank,
            f"{state} for {self._timeout:g} s while {beats[rank].stage}, and no rank computed; "
            "--timeout SECONDS allows more",
            stacks[rank],
        )

    def _stacks(self, beats: dict[int, Heartbeat]) -> dict[int, str]:
        """The stacks that ranks were asked for; a busy machine may take its time, a dead process never answers."""
        end = time.monotonic() + _ANSWER_SECONDS
        stacks: dict[int, str] = {}
        while time.monotonic() < end:
            last_stacks = stacks
            stacks = {rank: read_stack(self._directory, rank, beat) for rank, beat in beats.items()}
            # Twice the same: none is still being written.
            if (all(stacks.values()) and stacks == last_stacks) or self._stop.wait(_POLL_SECONDS):
                break
        return stacks


def _signal(beat: Heartbeat | None, number: signal.Signals) -> None:
    if beat is not None and not beat.done:
        with suppress(ProcessLookupError):  # it may end at any moment
            os.kill(beat.pid, number)


def _is_waiting(stack: str, beat: Heartbeat) -> bool:
    """True if the innermost calls are those of a rank that waits for, or computes, a part of the program."""
    innermost = [line for line in stack.splitlines() if line.lstrip().startswith("File ")][:2]
    return any(place in line for line in innermost for place in (*_WAITING_PLACES, *beat.computes_in))
