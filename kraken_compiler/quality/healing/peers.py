"""The processes that train together: one with all lanes, or one per lane."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kraken_compiler.ranks.communicators.communicator import Communicator


class Peers(Protocol):
    """Communication of one process with the others; all must ask for the same things in the same order.

    Attributes:
        rank: Number of this process.
        count: How many there are.
    """

    rank: int
    count: int

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        ...

    def gather(self, content: bytes) -> list[bytes]:
        """Every process's content, all of the same length, rank 0's first."""
        ...


class Alone:
    """A single process with all lanes."""

    rank, count = 0, 1

    def total(self, x: Tensor) -> Tensor:
        return x

    def gather(self, content: bytes) -> list[bytes]:
        return [content]


class RankPeers:
    """Processes with one lane each."""

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self.rank, self.count = communicator.rank, communicator.degree
        self._communicator, self._device = communicator, device

    def total(self, x: Tensor) -> Tensor:
        # One dim at least, because a communicator's parts are rows.
        return self._communicator.wait(self._communicator.start(x.reshape(-1))).view_as(x)

    def gather(self, content: bytes) -> list[bytes]:
        own = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        contents = self._communicator.all_gather(own, 0).cpu()
        return [bytes(part.tolist()) for part in contents.chunk(self.count)]


def share_of(peers: Peers, tokens: int) -> slice:
    """The tokens whose loss this process computes: every token is one process's."""
    return slice(peers.rank * tokens // peers.count, (peers.rank + 1) * tokens // peers.count)
