"""Ranks that die or hang: the run ends in bounded time, the guilty rank's own words come first, no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kraken_compiler.errors import InputFileError, RankFailedError, UsageError
from kraken_compiler.ranks.launch import launch, threads_per_rank
from kraken_compiler.ranks.run_ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TIMEOUT = 3.0
BOUND = 45.0
"""Start-up on a busy machine, the timeout, and taking down what is left."""


def ranks_left() -> list[int]:
    """Ranks that this process started and that still run."""
    return [
        child.pid for child in psutil.Process().children(recursive=True) if "call_rank" in " ".join(child.cmdline())
    ]


def misbehave(how: str, degree: int = 2) -> RankFailedError:
    """Rank 1 misbehaves; returns the error, having checked all that every case has in common."""
    started = time.monotonic()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RankFailedError) as caught:
        run_ranks("tests.runtime_functions:misbehave", degree, {"how": how}, timeout=TIMEOUT)
    assert time.monotonic() - started < BOUND
    assert ranks_left() == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "KRAKEN_RUN_DIRECTORY" not in os.environ
    assert str(caught.value).startswith("rank 1 ")
    assert "closed by peer" not in str(caught.value)
    return caught.value


def test_a_rank_that_raises() -> None:
    error = str(misbehave("raise", degree=3))
    assert error.startswith("rank 1 failed: ValueError: rank one fails on purpose\nTraceback")
    assert "in fail_on_purpose" in error


def test_a_rank_that_exits() -> None:
    error = str(misbehave("exit"))
    assert error.startswith("rank 1 exited with code 3 while reducing")
    assert "last words" in error


def test_a_rank_that_is_killed() -> None:
    assert str(misbehave("kill")).startswith("rank 1 was killed by SIGKILL while reducing")


def test_a_rank_that_is_stopped() -> None:
    error = str(misbehave("stop"))
    assert error.startswith("rank 1 hangs: it stopped answering for 3 s while reducing")
    assert "in misbehave" in error


def test_a_rank_that_oversleeps() -> None:
    error = str(misbehave("sleep", degree=3))
    assert error.startswith("rank 1 hangs: it made no progress for 3 s while reducing")
    assert "in oversleep" in error


def test_a_users_error_stays_one() -> None:
    with pytest.raises(InputFileError) as caught:
        run_ranks("tests.runtime_functions:misbehave", 2, {"how": "input"}, timeout=TIMEOUT)
    assert str(caught.value) == "/some/where/lane-1.safetensors: truncated"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, None), (signal.SIGKILL, -9)])
def test_no_rank_survives_the_launcher(number: signal.Signals, code: int | None, tmp_path: Path) -> None:
    call = f"run_ranks('tests.runtime_functions:sleep_for_long', 2, {{'directory': {str(tmp_path)!r}}})"
    program = f"from kraken_compiler.verify.execute import run_ranks\n{call}"
    # A launcher that is killed cannot tidy up; pytest does it.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        files = [tmp_path / "pid-0", tmp_path / "pid-1"]
        assert wait_for(lambda: all(path.exists() and path.read_text() for path in files))
        pids = [int(path.read_text()) for path in files]
        launcher.send_signal(number)
        _, stderr = launcher.communicate(timeout=BOUND)
    finally:
        launcher.kill()
        launcher.wait()
    if code is not None:
        assert launcher.returncode == code
    else:
        assert "KeyboardInterrupt" in stderr
    assert wait_for(lambda: not any(alive(pid) for pid in pids), seconds=10)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float = BOUND) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot start 0 ranks"):
        launch(0, [])
    assert threads_per_rank(10_000) == 1
    assert threads_per_rank(1) >= 1
