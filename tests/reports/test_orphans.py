"""However a launcher ends, and whenever, its ranks end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from kraken_compiler.ranks import start_rank
from kraken_compiler.ranks.start_rank import LAUNCHER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

CALL = """
from kraken_compiler.verify.execute import run_ranks
run_ranks("tests.reports.running_functions:say_pid_and_wait", 2, {{"directory": {directory!r}}})
"""
IN_A_THREAD = """
import threading
thread = threading.Thread(target=lambda: exec({call!r}))
thread.start()
thread.join()
"""
LET_GO_SECONDS = 5.0


class Launcher:
    """A process that starts ranks, and the ranks that it has."""

    def __init__(self, program: str, directory: Path) -> None:
        environment = {**os.environ, "TMPDIR": str(directory)}
        self.process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
        self.ranks: list[psutil.Process] = []

    def wait_for_ranks(self, count: int) -> None:
        end = time.monotonic() + 60
        while len(self.ranks) < count and time.monotonic() < end:
            assert self.process.poll() is None, "the launcher ended by itself"
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.process.pid).children()
                self.ranks = [child for child in children if "call_rank" in " ".join(child.cmdline())]
            time.sleep(0.005)
        assert len(self.ranks) >= count

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def left(self) -> list[int]:
        return [rank.pid for rank in self.ranks if is_running(rank)]

    def tidy_up(self) -> None:
        self.kill()
        for rank in self.ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launchers() -> Iterator[list[Launcher]]:
    started: list[Launcher] = []
    yield started
    for launcher in started:
        launcher.tidy_up()


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_ranks_that_still_start_end_with_their_launcher(
    tmp_path: Path, launchers: list[Launcher], delay: float
) -> None:
    """In the very first moment, while Python starts, and in the middle of the imports."""
    launchers.append(launcher := Launcher(CALL.format(directory=str(tmp_path)), tmp_path))
    launcher.wait_for_ranks(1 if delay == 0 else 2)
    time.sleep(delay)
    launcher.kill()
    assert ended(launcher)


def test_ranks_that_work_end_with_their_launcher_in_a_thread(tmp_path: Path, launchers: list[Launcher]) -> None:
    call = CALL.format(directory=str(tmp_path))
    launchers.append(launcher := Launcher(IN_A_THREAD.format(call=call), tmp_path))
    launcher.wait_for_ranks(2)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(launcher.left()) == 2
    launcher.kill()
    assert ended(launcher)


def ended(launcher: Launcher) -> bool:
    end = time.monotonic() + LET_GO_SECONDS
    while launcher.left() and time.monotonic() < end:
        time.sleep(0.05)
    return not launcher.left()


RANK = """
import os, sys, time
from kraken_compiler.ranks import start_rank
if sys.argv[1] == "without":
    start_rank._request_death_signal = lambda: False
start_rank.end_with_launcher(int(sys.argv[2]) or os.getppid())
print("alive", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], "0"])
time.sleep(60)
"""


@pytest.mark.parametrize("system", ["with", "without"])
def test_systems_without_a_signal_at_the_parents_end(system: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, RANK, system], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == b"alive\n"
        (rank,) = psutil.Process(parent.pid).children()
        assert is_running(rank)
    finally:
        parent.kill()
        parent.wait()
    try:
        end = time.monotonic() + LET_GO_SECONDS
        while is_running(rank) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(rank)
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.kill()


def test_a_launcher_that_ended_before_its_rank_looked() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**os.environ, LAUNCHER: str(gone.pid)}
    rank = subprocess.run(
        [sys.executable, "-P", start_rank.__file__, "kraken_compiler.ranks.call_rank"],
        check=False,
        env=environment,
        timeout=20,
    )
    assert rank.returncode == 1
