"""Communication without torch: sums are right to the bit, and what goes wrong is told in one line, not waited for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from kraken_compiler.errors import InputFileError, RankFailedError, UsageError
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.communicators import rendezvous as meeting
from kraken_compiler.ranks.communicators.agreement import Claims
from kraken_compiler.ranks.communicators.rendezvous import RendezvousPoint, rendezvous
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks, joined

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        number: int = listening.getsockname()[1]
        return number


def run(
    check: str,
    degree: int,
    environment: dict[str, str],
    *,
    each: dict[int, dict[str, Any]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What each rank found; `each` has options of single ranks. No launcher: a rank is a process with variables set."""
    ranks = []
    for rank in range(degree):
        own = {"timeout": 30.0} | options | (each or {}).get(rank, {})
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.array_ranks", check, json.dumps(own)],
            cwd=ROOT,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(degree)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ranks.append(process)
    results = []
    try:
        for process in ranks:
            output, errors = process.communicate(timeout=100)
            assert process.returncode == 0 or check == "lose", errors
            results.append(json.loads(output) if output else {})
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(result.get("torch") for result in results)
    return results


@pytest.mark.parametrize(("degree", "options"), [(2, {}), (3, {}), (3, {"buffer_bytes": 1 << 12})])
def test_sums_are_right_to_the_bit_on_all_ranks(degree: int, options: dict[str, Any], port: int) -> None:
    """Also where the kernel has no space for more than a few kilobytes of what is in flight."""
    master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    where = master if degree == 2 else {"MASTER_ADDR": "nowhere", "KRAKEN_MEET": f"127.0.0.1:{port}"}
    results = run("sums", degree, where, claims={"the program": "abc"}, **options)
    assert [result.get("wrong", result) for result in results] == [[]] * degree
    assert all(result["digests"] == results[0]["digests"] for result in results)


def test_the_last_sum_is_not_lost_when_peers_leave(port: int) -> None:
    for result in run("leave", 3, {"KRAKEN_MEET": f"127.0.0.1:{port}"}):
        assert result.get("totals", result) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("how", "told", "timeout"),
    # On a busy machine a process may take seconds to die, and is not to be taken for one that stays.
    [("die", "connection closed by peer: rank 1", 20.0), ("stay", "timed out waiting for rank 1", 2.0)],
)
def test_a_lost_peer_is_told_in_bounded_time(how: str, told: str, timeout: float, port: int) -> None:
    results = run("lose", 3, {"KRAKEN_MEET": f"127.0.0.1:{port}"}, how=how, timeout=timeout)
    for rank in (0, 2):
        assert told in results[rank]["error"]
        assert results[rank]["seconds"] < timeout + 2.0
        assert results[rank]["closing"] < 2.0


def test_what_the_ranks_disagree_on_is_told_on_all_of_them(port: int) -> None:
    where = {"KRAKEN_MEET": f"localhost:{port}"}
    programs = {rank: {"claims": {"the program's hash": value}} for rank, value in enumerate(["abc", "abd"])}
    told = "the ranks do not fit together: the program's hash is abc on rank 0 and abd on rank 1"
    assert [(result["error"], result["kind"]) for result in run("nothing", 2, where, each=programs)] == [
        (told, "UsageError")
    ] * 2
    first, second = run("disagree", 2, where)
    assert first["error"].startswith("rank 1 sent 20 bytes where rank 0 has 16; the ranks do not run the same program")
    assert second["error"].startswith("rank 0 sent 16 bytes where rank 1 has 20")


def meet_in_threads(point: RendezvousPoint, ranks: list[tuple[int, int]]) -> list[Any]:
    """Let ranks (number, degree) meet; returns the infos that each was told, or what it raised."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        found: list[Future[Any]] = [
            pool.submit(rendezvous, rank, degree, point, {"of": rank}, timeout=1.0) for rank, degree in ranks
        ]
        return [one.exception() or one.result() for one in found]


@pytest.fixture
def point(port: int, monkeypatch: pytest.MonkeyPatch) -> RendezvousPoint:
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.5)
    return RendezvousPoint("127.0.0.1", port)


def assert_told(found: list[Any], kind: type[Exception], text: str) -> None:
    assert [type(one) for one in found] == [kind] * len(found)
    assert [text in str(one) for one in found] == [True] * len(found), found
    assert not any("\n" in str(one) for one in found)


def test_everybody_gets_all_infos(point: RendezvousPoint) -> None:
    infos = [{"of": rank} for rank in range(3)]
    assert meet_in_threads(point, [(2, 3), (0, 3), (1, 3)]) == [infos] * 3
    # The port is free again at once, and a name stands for all interfaces.
    assert meet_in_threads(RendezvousPoint("localhost", point.port), [(1, 2), (0, 2)]) == [infos[:2]] * 2
    assert meet_in_threads(RendezvousPoint(socket.gethostname(), point.port), [(0, 1)]) == [infos[:1]]


def test_a_rank_that_does_not_come_is_named_on_all_that_did(point: RendezvousPoint) -> None:
    assert_told(
        meet_in_threads(point, [(0, 4), (2, 4)]), RankFailedError, f"ranks 1, 3 did not come to {point} within 1 s"
    )
    assert_told(meet_in_threads(point, [(1, 2)]), RankFailedError, "rank 0 did not answer within 1.5 s")


@pytest.mark.parametrize("guilty", [0, 2])
def test_a_rank_that_cannot_go_on_tells_the_others(guilty: int) -> None:
    """The other ranks need not wait for it."""

    def act(ranks: Ranks) -> Exception | None:
        trouble = InputFileError("a file: missing") if ranks.rank == guilty else None
        try:
            ranks.agree(Claims(trouble=trouble))
        except InputFileError as error:
            return error
        return None

    told = dict(enumerate(together(4, act)))
    assert str(told.pop(guilty)) == "a file: missing"
    assert_told(list(told.values()), InputFileError, f"rank {guilty}: a file: missing")


def test_ranks_of_different_runs_are_told_apart(point: RendezvousPoint) -> None:
    assert_told(
        meet_in_threads(point, [(0, 2), (1, 3)]),
        UsageError,
        "rank 1 was started with WORLD_SIZE=3, rank 0 with WORLD_SIZE=2",
    )
    assert_told(
        meet_in_threads(point, [(0, 3), (1, 3), (1, 3)]), UsageError, f"two processes came to {point} as rank 1"
    )


@pytest.mark.parametrize("message", [b"hello", b"[1]", b'{"version": 1, "rank": "0"}', b'{"version": 3}', b"[" * 10**5])
def test_a_stranger_is_told_on_all_ranks(point: RendezvousPoint, message: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://{point}")
        stranger.send(message)
        found = meet_in_threads(point, [(0, 3), (1, 3)])
    assert_told(found, RankFailedError, f"rank 0 was called by a stranger at {point}")


def test_who_does_not_speak_the_protocol_is_not_heard(point: RendezvousPoint) -> None:
    with ThreadPoolExecutor(1) as pool:
        meeting_of_two = pool.submit(meet_in_threads, point, [(0, 2), (1, 2)])
        with socket.socket() as scanner:
            while scanner.connect_ex((point.host, point.port)) and not meeting_of_two.done():
                time.sleep(0.01)
            scanner.close()
        assert meeting_of_two.result() == [[{"of": 0}, {"of": 1}]] * 2


def test_a_port_that_is_taken_is_told(point: RendezvousPoint) -> None:
    with closing(socket.create_server((point.host, point.port))):
        found = meet_in_threads(point, [(0, 2), (1, 2)])
    assert_told(found[:1], UsageError, f"rank 0 cannot listen at {point}: Address already in use; set KRAKEN_MEET")
    assert_told(found[1:], RankFailedError, f"rank 1 called {point} and rank 0 did not answer")


def test_an_answer_from_somebody_else_is_told(point: RendezvousPoint) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as somebody, ThreadPoolExecutor(1) as pool:
        somebody.setsockopt(zmq.LINGER, 0)
        somebody.bind(f"tcp://{point}")
        found = pool.submit(meet_in_threads, point, [(1, 2)])
        caller, _ = somebody.recv_multipart()
        somebody.send_multipart([caller, b'{"version": 6, "infos": [1]}'])
        assert_told(found.result(), RankFailedError, "who answered is not rank 0 of this run")


def test_an_address_that_is_not_here_is_listened_for_everywhere(port: int) -> None:
    assert RendezvousPoint("192.0.2.1", port).listen_endpoints() == [f"tcp://192.0.2.1:{port}", f"tcp://*:{port}"]
    assert RendezvousPoint("localhost", port).listen_endpoints()[0] == f"tcp://127.0.0.1:{port}"
    assert RendezvousPoint("host-7", port).listen_endpoints() == [f"tcp://*:{port}"]
    with zmq.Context() as context:
        host = meeting._Host(context, 2, RendezvousPoint("192.0.2.1", port), {})
        with host._listen() as router:
            assert router.get_string(zmq.LAST_ENDPOINT).endswith(f":{port}")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "RANK is not set; start this through kraken-run or torchrun, or set RANK and WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "RANK=0 and WORLD_SIZE=two are no whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is none of WORLD_SIZE=2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set; set KRAKEN_MEET to rank 0's host and a free port"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "x"}, "cannot meet at 'here:x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "KRAKEN_MEET": "here"}, "the ranks cannot meet at 'here'"),
    ],
)  # fmt: skip
def test_an_environment_that_does_not_say_enough(
    environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "KRAKEN_MEET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error, joined(1.0):
        pass
    assert told in str(error.value)


def test_a_point_is_read_with_ipv6_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRAKEN_MEET", "[::1]:1234")
    found = RendezvousPoint.from_environment()
    assert (found.host, found.port, str(found)) == ("::1", 1234, "[::1]:1234")


def test_a_single_rank_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    communicator = Ranks.rendezvous(Place.from_environment(), StatusWriter(0, None), 1.0, "float16")
    assert (communicator.rank, communicator.degree, communicator.identical_on_all_ranks) == (0, 1, True)
    x = np.array([1.0, 2.0001], np.float32)
    total = communicator.wait(communicator.start(x))
    assert total.tolist() == [1.0, 2.0]
    assert not np.shares_memory(total, x)
    assert communicator.all_gather(x, 0).tolist() == x.tolist()
    assert communicator.broadcast(b"alone") == b"alone"
    communicator.barrier()
    communicator.close()
    communicator.close()
