"""The choice of a program's communicator, which the programs of one process group share."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from kraken_compiler.errors import UsageError
from kraken_compiler.ranks.communicators.communicator import Communicator, find
from kraken_compiler.ranks.communicators.group import GroupCommunicator
from kraken_compiler.ranks.communicators.none import NoCommunication

KINDS = ("message", "group", "none")


def default_communicator(
    device: torch.device | str,
    group: dist.ProcessGroup,
    reduce_dtype: torch.dtype | None = None,
    kind: str | None = None,
) -> Communicator:
    """The communicator of a process group; made once, and closed when the group is destroyed or Python exits.

    Args:
        device: Where the parts are that will be summed.
        group: The ranks that run the lanes.
        reduce_dtype: To which parts are rounded before they are sent; None leaves them.
        kind: One of `KINDS`; None takes messages on CPUs and the process group elsewhere.

    Raises:
        UsageError: There is no such kind, or it cannot send from that device.
    """
    device = torch.device(device)
    if kind is None:
        kind = "message" if device.type in ("cpu", "meta") else "group"
    if kind not in KINDS:
        raise UsageError(f"there is no communicator '{kind}'; choose from {', '.join(KINDS)}")
    if kind == "message" and device.type not in ("cpu", "meta"):
        raise UsageError(f"the message communicator sends from main memory, not from {device.type}; use 'group'")
    name = f"{group.group_name}/{kind}/{reduce_dtype}"
    open_communicator = find(name)
    if open_communicator is not None:
        return open_communicator
    if kind == "none":
        communicator: Communicator = NoCommunication(dist.get_rank(group), dist.get_world_size(group), name)
    elif kind == "group":
        communicator = GroupCommunicator(group, reduce_dtype, name)
    else:
        # Imported here because only CPUs need it.
        from kraken_compiler.ranks.communicators.message import MessageCommunicator

        communicator = MessageCommunicator.of_group(group, reduce_dtype, name)
    # Groups are named in the order of their making, so a later group may get this one's name.
    weakref.finalize(group, communicator.close)
    return communicator
