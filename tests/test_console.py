"""What the command line shows of long work where no terminal is."""

from __future__ import annotations

import time

import pytest

from kraken_compiler.cli import console


@pytest.mark.parametrize("quiet", [False, True])
def test_long_stages_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    progress = console.ConsoleProgress(quiet)
    # rich asks the same clock; a bar that is not shown does so at its start and end only.
    with progress.steps("calibrate") as advance:
        for done in range(1, 9):
            advance(done, 8, "layer")
    with progress.stage("capture"):
        pass
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if " of 8, " in line]
    assert bool(lines) != quiet
    assert 0 < len(told) < 4 or quiet
    assert quiet or (lines[-2].startswith("calibrate: ") and lines[-1].startswith("capture: "))


def test_stages_within_stages_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands at the margin adds up to the whole."""
    progress = console.ConsoleProgress(quiet=False)
    with progress.steps("write and check") as advance:
        advance(1, 1, "tensors")
        with progress.stage("run on ranks"), progress.stage("meet"):
            pass
    with pytest.raises(RuntimeError), progress.stage("fail"):
        raise RuntimeError
    with progress.stage("capture"):
        pass
    lines = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["    meet", "  run on ranks", "write and check", "capture"]


def test_bars_on_a_terminal_within_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    monkeypatch.setenv("TERM", "xterm")
    progress = console.ConsoleProgress(quiet=False)
    with progress.stage("capture"):
        pass
    with progress.stage("write and check"), progress.steps("quality") as advance:
        advance(3, 7, "batches")
        time.sleep(0.5)  # bars are drawn ten times a second
    told = capsys.readouterr().err
    assert "3/7" in told
    assert told.rindex("write and check: ") > told.rindex("  quality: ") > told.rindex("capture: ")
