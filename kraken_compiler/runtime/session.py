"""A rank's life: join the process group, do the work, leave; or say why not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.errors import UsageError
from kraken_compiler.runtime.status import RUN_TIMEOUT, StatusWriter

DEFAULT_TIMEOUT = 60.0
"""Seconds without progress after which a run is given up."""

_BACKSTOP_SECONDS = 600.0


_SLOWEST_DISK = 50e6
"""Bytes per second at which a file is read and hashed at the least."""


@dataclass(frozen=True)
class Session:
    """This process as a rank.

    Attributes:
        rank: Number among all ranks.
        degree: How many there are.
        device: Where this rank computes.
        status: Where to report progress.
        one_machine: True if all ranks are here.
    """

    rank: int
    degree: int
    device: torch.device
    status: StatusWriter
    one_machine: bool = True


@contextmanager
def rank_session(timeout: float | None = None, device_type: str | None = None) -> Iterator[Session]:
    """Be a rank, as torchrun or our launcher set it up in the environment.

    Args:
        timeout: Seconds after which a collective whose peers do not answer raises; None asks the launcher.
        device_type: "cpu" or "cuda"; None takes CUDA if every local rank can have a device of its own.

    Raises:
        UsageError: The environment does not say which rank this is.
    """
    try:
        rank, degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_degree = int(os.environ.get("LOCAL_WORLD_SIZE", degree))
    except (KeyError, ValueError) as error:
        raise UsageError(f"start this through kraken-run or torchrun: {error} is not set as they set it") from error
    status = StatusWriter.from_environment(rank)
    status.start()
    try:
        device = _device(device_type, local_rank, local_degree)
        _join(device, _collective_timeout(timeout))
        status.progress("working")
        yield Session(rank, degree, device, status, local_degree == degree)
        status.progress("leaving")
        # A rank that leaves early would look like a dead one to peers that still compute.
        dist.barrier()
    except BaseException as error:
        status.fail(error)
        raise
    dist.destroy_process_group()
    status.finish()


def load_rank_program(
    directory: Path | str, session: Session, *, reduce_dtype: torch.dtype | None = None
) -> tuple[Artifact, RankProgram]:
    """Load this rank's program, and go on when all ranks have theirs.

    Args:
        directory: The artifact.
        session: This rank.
        reduce_dtype: To which each lane's part is rounded before it is sent; None leaves it.

    Raises:
        InputFileError: A file of the artifact is missing, truncated or tampered with.
        UsageError: There are more or fewer ranks than lanes.
    """
    artifact = open_artifact(directory, verify=False)
    largest = max((record.bytes for record in artifact.manifest.files.values()), default=0)
    session.status.progress("loading the program", extra=largest / _SLOWEST_DISK)
    program = RankProgram.load(artifact, device=session.device, reduce_dtype=reduce_dtype)
    # Here and not at the first reduce, where waiting for a slow disk would look like a hang.
    dist.barrier()
    session.status.progress("running")
    return artifact, program


def _device(device_type: str | None, local_rank: int, local_degree: int) -> torch.device:
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_degree else "cpu"
    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device(device_type, local_rank)
    torch.accelerator.set_device_index(local_rank)
    return device


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)


def _collective_timeout(timeout: float | None) -> timedelta:
    if timeout is not None:
        return timedelta(seconds=timeout)
    under_launcher = os.environ.get(RUN_TIMEOUT)
    if under_launcher is None:
        return timedelta(seconds=DEFAULT_TIMEOUT)
    # The launcher's watchdog sees all ranks and can tell which one hangs and which only takes long to load, so it is
    # given the first word.
    return timedelta(seconds=float(under_launcher) + _BACKSTOP_SECONDS)
