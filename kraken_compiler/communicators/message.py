"""`MessageCommunicator`: every rank sends its part to every other as a message, and each adds them up.

The bytes are moved by ZeroMQ's own thread while this rank computes. gloo, which torch brings for CPUs, takes 10 times
as long for small sums and hides hardly anything behind compute.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import zmq
from torch import Tensor

from kraken_compiler._torch_compat import group_timeout
from kraken_compiler.communicators.base import Communicator, in_lane_order
from kraken_compiler.communicators.group import GroupCommunicator
from kraken_compiler.communicators.peers import Peer, meet_peers
from kraken_compiler.errors import RankFailedError

COPY_BYTES = 128 << 10
"""Below this a part is copied into the message; from here on it is sent from where it lies."""
RING_BYTES = 4 << 20
"""From here on more than two ranks sum with the process group."""

_RING, _ALONE = -1, -2
"""Numbers of sums that the process group does, and of those for which nothing is sent."""

Handle = tuple[int, Tensor, torch.dtype, Any]


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
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._peers: list[Peer] = []
        self._sent = 0

    def start(self, x: Tensor) -> Handle:
        part = self.sent(x)
        if self._ring is not None and part.nbytes >= RING_BYTES:
            return _RING, part, x.dtype, self._ring.start(x)
        number, tracker = self._send(part)
        return number, part, x.dtype, tracker

    def wait(self, handle: Handle) -> Tensor:
        number, part, dtype, tracker = handle
        if number == _RING:
            assert self._ring is not None
            return self._ring.wait(tracker)
        others = self._receive(number, part)
        parts = in_lane_order(part, others, self.rank)
        if part.dtype != dtype:
            parts[0] = parts[0].to(dtype)
        total = torch.add(parts[0], parts[1]) if others else parts[0].clone()
        for more in parts[2:]:
            total.add_(more)
        if tracker is not None:
            self._require_sent(tracker)
        return total

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        part = x.contiguous()
        number, tracker = self._send(part)
        whole = torch.cat(in_lane_order(part, self._receive(number, part), self.rank), dim=dim)
        if tracker is not None:
            self._require_sent(tracker)
        return whole

    def close(self) -> None:
        super().close()
        if self._ring is not None:
            self._ring.close()
        for peer in self._peers:
            peer.close()
        self._peers = []
        if self._context is not None:
            self._context.term()
            self._context = None

    def _send(self, part: Tensor) -> tuple[int, Any]:
        """Send a part to every peer; returns its number, and what knows whether the part's memory is still read."""
        if self._context is None:
            self._connect()
        if not self._peers or not part.numel():
            return _ALONE, None
        number, self._sent = self._sent, self._sent + 1
        content = _buffer(part)
        if part.nbytes < COPY_BYTES:
            for peer in self._peers:
                peer.send(content)
            return number, None
        frame = zmq.Frame(content, track=True, copy=False, copy_threshold=0)
        for peer in self._peers:
            peer.send(frame, copy=False)
        return number, frame.tracker

    def _receive(self, number: int, part: Tensor) -> list[Tensor]:
        """The peers' parts of that number, in the memory of their messages."""
        if number == _ALONE:
            return [part] * len(self._peers)
        parts = []
        for peer in self._peers:
            frame = peer.frame(number)
            if len(frame) != part.nbytes:
                raise RankFailedError(
                    f"rank {peer.rank} sent {len(frame)} bytes where rank {self.rank} has {part.nbytes}; "
                    f"the ranks do not run the same program on inputs of the same shape"
                )
            parts.append(torch.frombuffer(frame.buffer, dtype=part.dtype).view(part.shape))
        return parts

    def _require_sent(self, tracker: zmq.MessageTracker) -> None:
        if not tracker.done:
            try:
                tracker.wait(self._timeout)
            except zmq.NotDone:
                raise RankFailedError(
                    f"rank {self.rank} timed out waiting for a peer to take its part, for {self._timeout:g} s"
                ) from None

    def _connect(self) -> None:
        group = self._group()
        assert group is not None, "the process group of this communicator is gone"
        # Not the process's own context: ours must be gone when the ranks part.
        self._context = zmq.Context()
        self._peers = meet_peers(self._context, group, self._timeout)
        self._sent = 1  # message 0 was the greeting


_SAME_SIZE = {1: torch.uint8, 2: torch.int16}


def _buffer(part: Tensor) -> Any:
    """A contiguous tensor's memory as Python sees it; numpy has no bfloat16 and no float8."""
    if part.dtype.itemsize < 4:
        part = part.view(_SAME_SIZE[part.dtype.itemsize])
    return part.numpy()
