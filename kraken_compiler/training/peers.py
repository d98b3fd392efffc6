"""The processes that train together: one with all lanes, one per lane, or several with all lanes each."""

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
        parts: How many processes have weights of their own; the others have those of the first.
    """

    rank: int
    count: int
    parts: int

    def rows_of(self, batch: int) -> slice:
        """The rows of a step that this process computes."""
        ...

    def tokens_of(self, tokens: int) -> slice:
        """Of the tokens of those rows, those whose loss this process computes."""
        ...

    def has_alike(self, shared: bool) -> bool:
        """Whether all processes have a weight alike, which all lanes share or do not."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        ...

    def gather(self, content: bytes) -> list[bytes]:
        """Every process's content, all of the same length, rank 0's first."""
        ...


class Alone:
    """A single process with all lanes."""

    rank, count, parts = 0, 1, 1

    def rows_of(self, batch: int) -> slice:
        return slice(None)

    def tokens_of(self, tokens: int) -> slice:
        return slice(None)

    def has_alike(self, shared: bool) -> bool:
        return False

    def total(self, x: Tensor) -> Tensor:
        return x

    def gather(self, content: bytes) -> list[bytes]:
        return [content]


class _Connected:
    """What processes have in common that a communicator connects."""

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

    def _share(self, count: int) -> slice:
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)


class RankPeers(_Connected):
    """Processes with one lane each: all compute all rows, and every token's loss is one process's."""

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        super().__init__(communicator, device)
        self.parts = self.count

    def rows_of(self, batch: int) -> slice:
        return slice(None)

    def tokens_of(self, tokens: int) -> slice:
        return self._share(tokens)

    def has_alike(self, shared: bool) -> bool:
        return shared


class Replicas(_Connected):
    """Processes with all lanes each, and rows of their own (data parallelism)."""

    parts = 1

    def rows_of(self, batch: int) -> slice:
        return self._share(batch)

    def tokens_of(self, tokens: int) -> slice:
        return slice(None)

    def has_alike(self, shared: bool) -> bool:
        return True
