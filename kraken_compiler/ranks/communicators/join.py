"""The device of a rank's tensors, and the communicator that adds them up over the ranks of a run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from kraken_compiler.errors import UsageError
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.group import GroupCommunicator
from kraken_compiler.ranks.communicators.message import MessageCommunicator
from kraken_compiler.ranks.environment import Place

if TYPE_CHECKING:
    from kraken_compiler.ranks.session import Ranks

_NAME = "ranks"


def rank_device(kind: str | None, place: Place) -> torch.device:
    """The device on which a rank computes.

    Args:
        kind: "cpu" or "cuda"; None takes CUDA if every local rank can have a device of its own.
        place: Which rank it is.
    """
    if kind is None:
        kind = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= place.local_degree else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, place.local_rank)
    torch.accelerator.set_device_index(place.local_rank)
    return device


def communicator_of(ranks: Ranks, device: torch.device) -> Communicator:
    """The communicator of a run's ranks: their own messages on CPUs, NCCL on GPUs.

    Args:
        ranks: This rank; on GPUs, all must call it together.
        device: Where the parts are.

    Raises:
        UsageError: A trace was asked for, of what the host of a GPU knows no times of.
    """
    reduce_dtype = None if ranks.reduce_dtype is None else getattr(torch, ranks.reduce_dtype.name)
    if device.type == "cpu":
        watch = ranks.trace.watch if ranks.trace is not None else None
        return MessageCommunicator(ranks.rank, ranks.degree, _NAME, lambda: ranks.exchange, reduce_dtype, watch)
    if ranks.trace is not None:
        raise UsageError("--trace records ranks on CPUs; on GPUs torch.profiler knows when kernels run")
    return GroupCommunicator(process_group(ranks, device), reduce_dtype)


def process_group(ranks: Ranks, device: torch.device) -> dist.ProcessGroup:
    """The process group of torch.distributed with a run's ranks, made at the first call; all must call it together.

    It comes together in a store of rank 0's, whatever started the ranks.
    """
    if not dist.is_initialized():
        timeout = timedelta(seconds=ranks.timeout)
        store = _store(ranks, timeout)
        is_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.degree,
            timeout=timeout,
            device_id=device if is_gpu else None,
        )
    group = dist.group.WORLD
    assert group is not None
    return group


def _store(ranks: Ranks, timeout: timedelta) -> Store:
    if ranks.degree == 1:
        return HashStore()
    if ranks.rank == 0:
        host = ranks.host.strip("[]")
        store = TCPStore(host, 0, ranks.degree, is_master=True, timeout=timeout, wait_for_workers=False)
        ranks.broadcast(f"{host} {store.port}".encode())
        return store
    host, _, port = ranks.broadcast(None).decode().partition(" ")
    return TCPStore(host, int(port), ranks.degree, is_master=False, timeout=timeout, wait_for_workers=False)
