"""`MessageCommunicator`: every rank sends its part to every other as a message, and each adds them up.

The bytes lie in the kernel's buffers while this rank computes. gloo, which torch brings for CPUs, takes 10 times
as long for small sums and hides hardly anything behind compute.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler._torch_compat import group_timeout, rendezvous_host
from kraken_compiler.ranks.communicators.addresses import bind_host
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.message_exchange import MessageExchange
from kraken_compiler.ranks.communicators.rank_info import exchange_info
from kraken_compiler.ranks.communicators.sums import Exchange, Handle, MessageSums


class TensorSums(MessageSums[Tensor]):
    """Sums tensors on a CPU; see `MessageSums`. `reduce_dtype` is a torch dtype."""

    def _contiguous(self, x: Tensor, dtype: Any = None) -> Tensor:
        rounds = dtype is not None and dtype.itemsize < x.dtype.itemsize and x.is_floating_point()
        return (x.to(dtype) if rounds else x).contiguous()

    def _bytes(self, x: Tensor) -> memoryview:
        try:
            memory: memoryview = x.numpy().data
        except (TypeError, RuntimeError):  # numpy does not know the type, or autograd knows the tensor
            memory = x.detach().reshape(-1).view(torch.uint8).numpy().data
        return memory.cast("B") if memory.nbytes else memoryview(b"")

    def _flat(self, x: Tensor) -> Tensor:
        return x.detach().view(-1)

    def _shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        return flat.view(like.shape)

    def _view(self, memory: memoryview, like: Tensor) -> Tensor:
        return torch.frombuffer(memory, dtype=like.dtype) if len(memory) else like.new_empty(0)

    def _empty(self, like: Tensor, dtype: Any) -> Tensor:
        return like.new_empty(like.shape, dtype=dtype)

    def _add(self, parts: Sequence[Tensor], out: Tensor) -> None:
        first, *others = (part.to(out.dtype) for part in parts)
        if not others:
            out.copy_(first)
            return
        torch.add(first, others[0], out=out)
        for other in others[1:]:
            out.add_(other)

    def _sum(self, contents: Sequence[memoryview], part: Tensor, dtype: Any) -> Tensor:
        if len(contents) == 1 and self.reduce_dtype is None:
            # As few calls as there can be: behind a layer's weights the code of each is cold, and takes 20 to 40 us.
            return self._view(contents[0], part).view_as(part).add_(part.detach())
        return super()._sum(contents, part, dtype)

    def _join(self, parts: Sequence[Tensor], like: Tensor, dim: int) -> Tensor:
        return torch.cat([self._shaped(part, like) for part in parts], dim=dim)


class MessageCommunicator(Communicator):
    """Sums tensors by exchanging parts directly, on CPUs; see `TensorSums`."""

    kind: ClassVar[str] = "message"

    def __init__(
        self,
        rank: int,
        degree: int,
        name: str,
        connect: Callable[[], Exchange | None],
        reduce_dtype: torch.dtype | None = None,
        watch: Callable[[TensorSums], None] | None = None,
    ) -> None:
        """Prepare for the ranks.

        Args:
            rank, degree, name: See `Communicator`.
            connect: Connects the ranks, at the first operation; gives None for a single one.
            reduce_dtype: To which parts are rounded before they are sent; None leaves them.
            watch: Is given what sums before it does; None if nobody watches.
        """
        super().__init__(rank, degree, name, reduce_dtype=reduce_dtype)
        self._connect, self._watch = connect, watch
        self._sums: TensorSums | None = None

    @classmethod
    def of_group(
        cls,
        group: dist.ProcessGroup,
        reduce_dtype: torch.dtype | None = None,
        name: str = "",
        *,
        timeout: float | None = None,
    ) -> Self:
        """The communicator of a process group, which is not kept alive; the ranks exchange their addresses in it.

        Args:
            group: The ranks that run the lanes.
            reduce_dtype: To which parts are rounded before they are sent; None leaves them.
            name: The communicator's name; by default made from the group's.
            timeout: Seconds without an answer after which a peer counts as dead; None takes the group's.
        """
        rank, degree = dist.get_rank(group), dist.get_world_size(group)
        seconds = group_timeout(group) if timeout is None else timeout
        group_reference = weakref.ref(group)

        def connect() -> Exchange | None:
            group = group_reference()
            assert group is not None, "the process group of this communicator is gone"
            if degree == 1:
                return None
            master = os.environ.get("MASTER_ADDR") or rendezvous_host(group) or socket.gethostname()
            return MessageExchange(rank, degree, bind_host(master), lambda info: exchange_info(info, group), seconds)

        return cls(rank, degree, name or f"{group.group_name}/{cls.kind}/{reduce_dtype}", connect, reduce_dtype)

    def start(self, x: Tensor) -> Handle[Tensor]:
        return self._open().start(x)

    def wait(self, handle: Handle[Tensor]) -> Tensor:
        return self._open().wait(handle)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self._open().all_gather(x, dim)

    def close(self) -> None:
        super().close()
        if self._sums is not None:
            self._sums.close()
            self._sums = None

    def _open(self) -> TensorSums:
        if self._sums is None:
            self._sums = TensorSums(self.rank, self.degree, self._connect(), self.reduce_dtype)
            if self._watch is not None:
                self._watch(self._sums)
        return self._sums
