"""`MessageCommunicator`: every rank sends its part to every other as a message, and each adds them up.

The bytes are moved by ZeroMQ's own thread while this rank computes. gloo, which torch brings for CPUs, takes 10 times
as long for small sums and hides hardly anything behind compute.
"""

from __future__ import annotations

import os
import socket
import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler._torch_compat import group_timeout, rendezvous_host
from kraken_compiler.communicators.addresses import bind_host
from kraken_compiler.communicators.base import Communicator, in_lane_order
from kraken_compiler.communicators.cards import swap_cards
from kraken_compiler.communicators.exchange import Exchange, Sending
from kraken_compiler.communicators.group import GroupCommunicator

RING_BYTES = 4 << 20
"""From here on more than two ranks sum with the process group."""

Handle = tuple[Sending | None, Tensor, torch.dtype, Any]
"""The part on its way (None: it has no elements, or the process group does the sum), the part as it is sent, the sum's
dtype, and the process group's handle."""


class MessageCommunicator(Communicator):
    """Sums by exchanging parts directly, on CPUs.

    Parts are added in the order of the ranks and in the activations' dtype, so all ranks get the same bits. Direct
    exchange sends (N-1) times the payload per rank, a ring 2 (N-1) / N times; so large sums of more than two ranks go
    through the process group.

    The ranks connect at the first operation.
    """

    kind: ClassVar[str] = "message"

    def __init__(
        self,
        group: dist.ProcessGroup,
        reduce_dtype: torch.dtype | None = None,
        name: str = "",
        *,
        timeout: float | None = None,
    ) -> None:
        """Prepare for the ranks of a group; it is not kept alive.

        Args:
            group: The ranks that run the lanes; it tells them where they are.
            reduce_dtype: To which parts are rounded before they are sent; None leaves them.
            name: The communicator's name; by default made from the group's.
            timeout: Seconds without an answer after which a peer counts as dead; None takes the group's.
        """
        super().__init__(
            dist.get_rank(group),
            dist.get_world_size(group),
            name or f"{group.group_name}/message/{reduce_dtype}",
            reduce_dtype=reduce_dtype,
        )
        self._group = weakref.ref(group)
        self._timeout = group_timeout(group) if timeout is None else timeout
        self._ring = GroupCommunicator(group, reduce_dtype, f"{self.name}/ring") if self.degree > 2 else None
        self._exchange: Exchange | None = None

    def start(self, x: Tensor) -> Handle:
        part = self.sent(x)
        if self._ring is not None and part.nbytes >= RING_BYTES:
            return None, part, x.dtype, self._ring.start(x)
        return self._send(part), part, x.dtype, None

    def wait(self, handle: Handle) -> Tensor:
        sending, part, dtype, ring = handle
        if ring is not None:
            assert self._ring is not None
            return self._ring.wait(ring)
        others = self._receive(sending, part)
        parts = in_lane_order(part, others, self.rank)
        if part.dtype != dtype:
            parts[0] = parts[0].to(dtype)
        total = torch.add(parts[0], parts[1]) if others else parts[0].clone()
        for more in parts[2:]:
            total.add_(more)
        self._require_sent(sending)
        return total

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        part = x.contiguous()
        sending = self._send(part)
        whole = torch.cat(in_lane_order(part, self._receive(sending, part), self.rank), dim=dim)
        self._require_sent(sending)
        return whole

    def close(self) -> None:
        super().close()
        if self._ring is not None:
            self._ring.close()
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def _send(self, part: Tensor) -> Sending | None:
        if self._exchange is None:
            self._exchange = self._meet()
        return self._exchange.send(_buffer(part), part.nbytes) if part.numel() else None

    def _receive(self, sending: Sending | None, part: Tensor) -> list[Tensor]:
        """The peers' parts, in the memory of their messages."""
        if sending is None:
            return [part] * (self.degree - 1)
        assert self._exchange is not None
        frames = self._exchange.receive(sending)
        return [torch.frombuffer(frame.buffer, dtype=part.dtype).view(part.shape) for frame in frames]

    def _require_sent(self, sending: Sending | None) -> None:
        if sending is not None:
            assert self._exchange is not None
            self._exchange.require_sent(sending)

    def _meet(self) -> Exchange:
        group = self._group()
        assert group is not None, "the process group of this communicator is gone"
        master = os.environ.get("MASTER_ADDR") or rendezvous_host(group) or socket.gethostname()
        return Exchange(self.rank, self.degree, bind_host(master), lambda card: swap_cards(card, group), self._timeout)


_SAME_SIZE = {1: torch.uint8, 2: torch.int16}


def _buffer(part: Tensor) -> Any:
    """A contiguous tensor's memory as Python sees it; numpy has no bfloat16 and no float8."""
    if part.dtype.itemsize < 4:
        part = part.view(_SAME_SIZE[part.dtype.itemsize])
    return part.numpy()
