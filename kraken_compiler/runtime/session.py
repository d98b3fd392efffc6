"""A rank's life: join the process group, do the work, leave; or say why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.rank_claims import rank_claims
from kraken_compiler.backends.torch_dist.lane_files import rank_files
from kraken_compiler.backends.torch_dist.lane_of_rank import check_lane
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.communicators.agreement import Claims
from kraken_compiler.communicators.cards import require_agreement
from kraken_compiler.errors import KrakenError, RankFailedError
from kraken_compiler.runtime.environment import DEFAULT_TIMEOUT as DEFAULT_TIMEOUT
from kraken_compiler.runtime.environment import SLOWEST_DISK, Place, collective_timeout
from kraken_compiler.runtime.status import StatusWriter

_FRAME_BYTES = 512
_SIZE_BYTES = 8


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

    def broadcast(self, content: bytes | None) -> bytes:
        """Rank 0's content, on every rank; all must call it together.

        Args:
            content: On rank 0, what to send, which may be empty; None on the others.
        """
        room = _FRAME_BYTES - _SIZE_BYTES
        given = content or b""
        # The size and a short content travel together, because a token's choice is sent at every step.
        head = self._broadcast((len(given).to_bytes(_SIZE_BYTES, "little") + given[:room]).ljust(_FRAME_BYTES))
        size = int.from_bytes(head[:_SIZE_BYTES], "little")
        short = head[_SIZE_BYTES : _SIZE_BYTES + size]
        return short if size <= room else short + self._broadcast(given[room:] or bytes(size - room))

    def _broadcast(self, content: bytes) -> bytes:
        """Content of a size that all ranks know."""
        told = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        dist.broadcast(told, src=0)
        return told.cpu().numpy().tobytes()


@contextmanager
def rank_session(timeout: float | None = None, device_type: str | None = None) -> Iterator[Session]:
    """Be a rank, as torchrun or our launcher set it up in the environment.

    Args:
        timeout: Seconds after which a collective whose peers do not answer raises; None asks the launcher.
        device_type: "cpu" or "cuda"; None takes CUDA if every local rank can have a device of its own.

    Raises:
        UsageError: The environment does not say which rank this is.
    """
    place = Place.from_environment()
    status = StatusWriter.from_environment(place.rank)
    status.start()
    try:
        device = _device(device_type, place)
        _join(device, timedelta(seconds=collective_timeout(timeout)))
        status.computes_here = device.type == "cpu"
        status.progress("working")
        yield Session(place.rank, place.degree, device, status, place.one_machine)
        status.progress("leaving")
        # A rank that leaves early would look like a dead one to peers that still compute.
        dist.barrier()
    except BaseException as error:
        status.fail(error)
        raise
    dist.destroy_process_group()
    status.finish()


def load_rank_program(
    directory: Path | str,
    session: Session,
    *,
    reduce_dtype: torch.dtype | None = None,
    check: Callable[[Artifact], None] | None = None,
) -> tuple[Artifact, RankProgram]:
    """Load this rank's program, and go on when all ranks have theirs.

    Args:
        directory: The artifact.
        session: This rank.
        reduce_dtype: To which each lane's part is rounded before it is sent; None leaves it.
        check: Raises if the artifact is not the one to run.

    Raises:
        InputFileError: A file of the artifact is missing, truncated or tampered with, on any rank, or the ranks have
            different artifacts.
        UsageError: There are more or fewer ranks than lanes, or the ranks do not fit together.
    """
    artifact = _agreed_artifact(directory, session, reduce_dtype, check)
    files = artifact.manifest.files
    needed = sum(files[name].bytes for name in rank_files(session.rank) if name in files)
    session.status.progress("loading the program", extra=needed / SLOWEST_DISK)
    program = RankProgram.load(artifact, device=session.device, reduce_dtype=reduce_dtype, agreed=True)
    # Here and not at the first reduce, where waiting for a slow disk would look like a hang.
    dist.barrier()
    session.status.progress("running")
    return artifact, program


def _agreed_artifact(
    directory: Path | str,
    session: Session,
    reduce_dtype: torch.dtype | None,
    check: Callable[[Artifact], None] | None,
) -> Artifact:
    """Open this rank's artifact; what is wrong on one rank is raised on all, before any reads weights."""
    artifact: Artifact | None = None
    claims = Claims()
    try:
        artifact = open_artifact(directory, verify=False)
        if check is not None:
            check(artifact)
        check_lane(session.rank, artifact.manifest.degree, rank=session.rank, ranks=session.degree)
        claims = Claims(rank_claims(artifact, "torch", reduce_dtype))
    except KrakenError as error:
        if session.status.has_launcher:
            raise  # it ends the others
        claims = Claims(trouble=error)
    assert dist.group.WORLD is not None
    require_agreement(claims, dist.group.WORLD)
    assert artifact is not None, "what is wrong with it was raised"
    return artifact


def _device(device_type: str | None, place: Place) -> torch.device:
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= place.local_degree else "cpu"
    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device(device_type, place.local_rank)
    torch.accelerator.set_device_index(place.local_rank)
    return device


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankFailedError(
            f"the ranks did not come together within {timeout.total_seconds():g} s ({reason}); start all of them for "
            "the same backend, and --timeout SECONDS allows more"
        ) from error
