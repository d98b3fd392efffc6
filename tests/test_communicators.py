"""The communicators on real ranks: sums are right and the same everywhere, and a lost peer is told, not waited for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from kraken_compiler.errors import RankFailedError, UsageError
from kraken_compiler.ranks.communicators.choose import default_communicator
from kraken_compiler.ranks.communicators.communicator import communicator_named
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.ranks.run_ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

FUNCTIONS = "tests.communicator_functions"


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_sums_are_right_and_the_same_on_all_ranks(degree: int) -> None:
    results = run_ranks(f"{FUNCTIONS}:check_sums", degree)
    assert [result["wrong"] for result in results] == [[]] * degree
    assert all(result["digests"] == results[0]["digests"] for result in results)


@pytest.mark.parametrize("elements", [100, 200_000])
@pytest.mark.parametrize(
    ("how", "told"), [("leave", "connection closed by peer: rank 1"), ("stay", "timed out waiting for rank 1")]
)
def test_a_lost_peer_is_told_in_bounded_time(how: str, told: str, elements: int) -> None:
    payload = {"how": how, "timeout": 3.0, "elements": elements}
    for rank, result in enumerate(run_ranks(f"{FUNCTIONS}:lose_a_peer", 3, payload)):
        if rank != 1:
            assert told in result["error"]
            assert result["seconds"] < 3.0 + 2.0
            assert result["closing"] < 2.0


def test_a_dead_peer_ends_the_run() -> None:
    with pytest.raises(RankFailedError, match="rank 1 exited with code 3"):
        run_ranks(f"{FUNCTIONS}:die", 3)


@pytest.mark.parametrize("elements", [(4, 5), (4, 50_000), (40_000, 50_000)])
def test_parts_of_different_size_are_told(elements: tuple[int, int]) -> None:
    ours, theirs = (4 * count for count in elements)
    first, second = run_ranks(f"{FUNCTIONS}:disagree", 2, {"elements": elements})
    assert first.startswith(
        f"rank 1 sent {theirs} bytes where rank 0 has {ours}; the ranks do not run the same program"
    )
    assert second.startswith(f"rank 0 sent {ours} bytes where rank 1 has {theirs}")


def test_a_communicator_ends_with_its_group() -> None:
    for result in run_ranks(f"{FUNCTIONS}:end_with_the_group", 2):
        assert result == {"totals": [1.0] * 3, "open": [False] * 3}


def test_no_communication_is_a_communicator_that_sends_nothing() -> None:
    communicator = NoCommunication(1, 3)
    x = torch.randn(2, 4)
    assert communicator_named("none") is communicator
    assert communicator.wait(communicator.start(x)) is x
    assert torch.equal(communicator.all_gather(x, -1), torch.cat([x, x, x], -1))
    assert copy.deepcopy(communicator) is communicator
    communicator.close()
    communicator.close()
    with pytest.raises(KeyError):
        communicator_named("none")


def test_the_device_decides_and_a_name_overrides() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        group = dist.group.WORLD
        assert group is not None
        kinds = [default_communicator(device, group).kind for device in ("cpu", "meta", "cuda")]
        assert kinds == ["message", "message", "group"]
        assert default_communicator("cpu", group, kind="none").kind == "none"
        with pytest.raises(UsageError, match="no communicator 'pigeon'; choose from message, group, none"):
            default_communicator("cpu", group, kind="pigeon")
        with pytest.raises(UsageError, match="not from cuda"):
            default_communicator("cuda", group, kind="message")
    finally:
        dist.destroy_process_group()
