"""What the command line shows of long work where no terminal is."""

from __future__ import annotations

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
