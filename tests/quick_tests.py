"""What keeps tests within minutes: the guard of those without the mark `slow`, shares of all, the record of durations.

`make test` runs the tests that start no process and take moments, and one real run of each backend (`end_to_end`).
`make test-all` runs the others, which are marked `slow`. A test that should be marked and is not fails.
"""

from __future__ import annotations

import sys
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

SLOWEST = 60

_PROCESS_STARTS = frozenset(
    ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system")
)


def mostly_slow(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters of a test, all but a few of them marked `slow`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


class SlowMarks:
    """Fails tests without the mark that start a process; which ones compute for long, the record of durations shows."""

    def __init__(self) -> None:
        self._guarded = False
        self._offence = ""
        sys.addaudithook(self._audit)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        yield from self._watched(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from self._watched(item)

    def _watched(self, item: pytest.Item) -> Iterator[None]:
        if item.get_closest_marker("slow"):
            yield
            return
        self._guarded, self._offence = True, ""
        try:
            yield
        finally:
            self._guarded = False
        if self._offence:
            pytest.fail(_advice(self._offence), pytrace=False)

    def _audit(self, event: str, _: tuple[Any, ...]) -> None:
        if self._guarded and event in _PROCESS_STARTS:
            # Kept, too: what starts the process may be in another thread, or carry on without it.
            self._offence = f"starts a process ({event})"
            pytest.fail(_advice(self._offence))


class Share:
    """Runs one of several shares of the tests: every test is in one of them, by its name.

    Args:
        text: "K/N": share K, 0-based, of N.
    """

    def __init__(self, text: str) -> None:
        number, _, count = text.partition("/")
        self._number, self._count = int(number), int(count)
        if not 0 <= self._number < self._count:
            raise pytest.UsageError(f"--share {text}: there are shares 0/{count} to {self._count - 1}/{count}")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        taken, left = [], []
        for item in items:
            (taken if zlib.crc32(item.nodeid.encode()) % self._count == self._number else left).append(item)
        items[:] = taken
        config.hook.pytest_deselected(items=left)


class Durations:
    """Writes the slowest tests and the time of every file, set-up and tear-down included."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self._seconds.items():
            files[test.partition("::")[0]] += seconds
        lines = [f"{len(self._seconds)} tests, {sum(self._seconds.values()):.0f} s in all workers together"]
        lines += ["", f"the slowest {SLOWEST}", *_slowest_first(self._seconds)[:SLOWEST]]
        lines += ["", "files", *_slowest_first(files)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _slowest_first(durations: Mapping[str, float]) -> list[str]:
    slowest = sorted(durations.items(), key=lambda entry: -entry[1])
    return [f"{seconds:8.2f}  {name}" for name, seconds in slowest]


def _advice(offence: str) -> str:
    return f"this test {offence}: mark it, or its module, with pytest.mark.slow (tests/quick_tests.py)"
