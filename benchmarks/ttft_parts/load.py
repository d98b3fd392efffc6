"""How much of the cores others took while a cell was measured. Medians hide a short burst, not a busy neighbour."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

BUSY = 0.05
"""Share of the cores above which a cell is reported as disturbed."""
_TICKS = os.sysconf("SC_CLK_TCK")


class OthersLoad:
    """CPU time of everybody but the given processes, since it was made.

    Args:
        own: Process ids that do not count, beside this one.
    """

    def __init__(self, own: Iterable[int]) -> None:
        self._own = (os.getpid(), *own)
        self._cores = sorted(os.sched_getaffinity(0))
        self._began = time.monotonic()
        self._before = self._others()

    def share(self) -> float | None:
        """Of all the CPU time there was, between 0 and 1; None where there is no /proc."""
        now = self._others()
        if now is None or self._before is None:
            return None
        there_was = (time.monotonic() - self._began) * len(self._cores)
        return max(0.0, (now - self._before) / max(there_was, 1e-9))

    def _others(self) -> float | None:
        try:
            return (self._busy() - sum(map(_of_process, self._own))) / _TICKS
        except OSError:
            return None

    def _busy(self) -> int:
        """Ticks of user, nice, system and stolen time; interrupts are left out, most of them are our own packets."""
        total = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in self._cores:
                total += sum(int(fields[index]) for index in (0, 1, 2, 7))
        return total


def _of_process(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
