"""The lane of a rank, and the check that the started ranks are the ones that the program needs."""

from __future__ import annotations

import torch.distributed as dist

from kraken_compiler.errors import UsageError
from kraken_compiler.ranks.communicators.communicator import Communicator


def lane_of_rank(
    lane: int | None, degree: int, group: dist.ProcessGroup | None, communicator: Communicator | str | None
) -> int:
    """The requested lane, or else this rank's.

    Args:
        lane: Number of the lane; None means this rank's.
        degree: Number of lanes.
        group: The ranks that run the lanes; None means all. Not asked for if `communicator` is an object.
        communicator: What adds up the lanes' parts.

    Raises:
        UsageError: This rank cannot run it.
    """
    if isinstance(communicator, Communicator):
        lane = communicator.rank if lane is None else lane
        check_lane(lane, degree, rank=communicator.rank, ranks=communicator.degree)
    else:
        lane = _rank(group) if lane is None else lane
        checked_group(lane, degree, group)
    return lane


def checked_group(lane: int, degree: int, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group, in which this rank can run the lane; None means all ranks.

    Raises:
        UsageError: There is none, its size is not the degree, or the lane is not this rank's.
    """
    check_lane(lane, degree, rank=_rank(group), ranks=dist.get_world_size(group))
    process_group = dist.group.WORLD if group is None else group
    assert process_group is not None
    return process_group


def check_lane(lane: int, degree: int, *, rank: int, ranks: int) -> None:
    """Make sure that this rank can run the lane.

    Raises:
        UsageError: The number of ranks is not the degree, or the lane is not this rank's.
    """
    if ranks != degree:
        raise UsageError(
            f"the program has {degree} lanes, the process group {ranks} rank{'s' * (ranks != 1)}; "
            f"start {degree} ranks, or compile for degree {ranks}"
        )
    if lane != rank:
        raise UsageError(f"rank {rank} of the group must run lane {rank}, not lane {lane}")


def _rank(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("a rank's program needs an initialised torch.distributed process group")
    return dist.get_rank(group)
