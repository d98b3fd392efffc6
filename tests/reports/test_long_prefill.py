"""A rank that computes is never called hanging, however long it takes; one that does not is, in bounded time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kraken_compiler.errors import RankFailedError
from kraken_compiler.ranks.heartbeat import StatusWriter, read_heartbeats
from kraken_compiler.ranks.run_ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TIMEOUT = 2.0
LONG = 4.5
"""More than twice the timeout, with no report of progress in between."""


@pytest.mark.parametrize(
    "ranks",
    [
        # Its peer waits for it inside a collective, and neither works nor gets on.
        [[("multiply", LONG)], []],
        # First the one, then the other: neither computes all the time.
        [[("multiply", LONG / 2), ("sleep", LONG / 2)], [("sleep", LONG / 2), ("think", LONG / 2)]],
    ],
)
def test_ranks_that_compute_are_left_alone(ranks: list[list[tuple[str, float]]]) -> None:
    found = run_ranks("tests.reports.running_functions:act", len(ranks), {"ranks": ranks}, timeout=TIMEOUT)
    assert found == ["done"] * len(ranks)


@pytest.mark.parametrize(
    "ranks",
    [
        [[], [("multiply", LONG), ("sleep", 600)]],
        [[("think", 1)], [("sleep", 600)], [("multiply", 1)]],
    ],
)
def test_a_rank_that_sleeps_hangs(ranks: list[list[tuple[str, float]]]) -> None:
    guilty = next(rank for rank, acts in enumerate(ranks) if ("sleep", 600) in acts)
    started = time.monotonic()
    with pytest.raises(RankFailedError) as caught:
        run_ranks("tests.reports.running_functions:act", len(ranks), {"ranks": ranks}, timeout=TIMEOUT)
    assert time.monotonic() - started < 60
    first = str(caught.value).splitlines()[0]
    assert first == (
        f"rank {guilty} hangs: it made no progress for 2 s while reading a long prompt, and no rank computed; "
        "--timeout SECONDS allows more"
    )


def test_waiting_at_full_speed_for_an_accelerator_is_no_computing(tmp_path: Path) -> None:
    from tests.reports.running_functions import think

    for computes_here in (True, False):
        status = StatusWriter(0, tmp_path)
        status.computes_here = computes_here
        status.start()
        began = time.time()
        think(1.3)
        beat = read_heartbeats(tmp_path)[0]
        status.finish()
        assert (beat.computed > began) == computes_here
