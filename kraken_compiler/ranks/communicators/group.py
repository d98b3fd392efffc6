"""`GroupCommunicator`: torch.distributed, that is NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.ranks.communicators.communicator import Communicator


class GroupCommunicator(Communicator):
    """Sums with a process group's asynchronous all_reduce.

    NCCL runs it on a stream of its own. With `reduce_dtype` the group also adds in that type.
    """

    kind: ClassVar[str] = "group"

    def __init__(self, group: dist.ProcessGroup, reduce_dtype: torch.dtype | None = None, name: str = "") -> None:
        """Use a group; it is not kept alive.

        Args:
            group: The ranks that run the lanes.
            reduce_dtype: To which parts are rounded before they are sent and added; None leaves them.
            name: The communicator's name; by default made from the group's.
        """
        super().__init__(
            dist.get_rank(group),
            dist.get_world_size(group),
            name or f"{group.group_name}/group/{reduce_dtype}",
            reduce_dtype=reduce_dtype,
            # gloo adds every element on one rank and hands the sum on; NCCL's algorithms promise nothing.
            identical_on_all_ranks=dist.get_backend(group) == "gloo",
        )
        self.group_name = group.group_name
        self._group = weakref.ref(group)

    def start(self, x: Tensor) -> tuple[Any, Tensor, torch.dtype]:
        part = self.part_to_send(x)
        if part is x:
            part = x.clone()  # summed in place
        return dist.all_reduce(part, group=self._group(), async_op=True), part, x.dtype

    def wait(self, handle: tuple[Any, Tensor, torch.dtype]) -> Tensor:
        work, total, dtype = handle
        if work is not None:
            work.wait()
        return total.to(dtype)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        part = x.contiguous()
        # Ranks are gathered along a new first dim, whatever dim the parts belong to.
        parts = part.new_empty((self.degree, *part.shape))
        dist.all_gather_into_tensor(parts, part.unsqueeze(0), group=self._group())
        return torch.cat(parts.unbind(0), dim=dim)
