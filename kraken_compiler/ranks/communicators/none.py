"""`NoCommunication`: a communicator that sends nothing, for the cost of a program alone. Its results are wrong."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kraken_compiler.ranks.communicators.communicator import Communicator


class NoCommunication(Communicator):
    """Sends nothing: a "sum" is the rank's own part. The bound for benchmarks, WRONG RESULTS on purpose.

    It needs no process group and no peers.
    """

    kind: ClassVar[str] = "none"
    gathers: ClassVar[bool] = False

    def __init__(self, rank: int, degree: int, name: str = "none") -> None:
        super().__init__(rank, degree, name, identical_on_all_ranks=False)

    def start(self, x: Tensor) -> Tensor:
        return x

    def wait(self, handle: Tensor) -> Tensor:
        return handle

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat([x] * self.degree, dim=dim)
