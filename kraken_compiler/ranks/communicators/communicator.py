"""`Communicator`: the sums and gathers of a lane program, as one rank calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


class Communicator(ABC):
    """Sums and gathers tensors over the ranks that run the lanes.

    Every rank must call the same operations in the same order, except that waits may come in any order. A sum is in
    flight from `start` to `wait`; any number may be. One thread at a time.

    Attributes:
        kind: Its name on command lines.
        rank: This rank's number, which is its lane's.
        degree: Number of ranks.
        name: Under which compiled code finds it (`communicator_named`); the same on all ranks and in every run.
        reduce_dtype: To which every rank rounds its part of a sum before it is sent; None sends it as it is.
        identical_on_all_ranks: True if a sum is the same on all ranks to the last bit.
        gathers: False if `all_gather` does not give all ranks the same: every rank's part, to the last bit.
        in_flight: Handles of the sums that compiled code awaits, by the address of the part.
    """

    kind: ClassVar[str]
    gathers: ClassVar[bool] = True

    def __init__(
        self,
        rank: int,
        degree: int,
        name: str,
        *,
        reduce_dtype: torch.dtype | None = None,
        identical_on_all_ranks: bool = True,
    ) -> None:
        self.rank = rank
        self.degree = degree
        self.name = name
        self.reduce_dtype = reduce_dtype
        self.identical_on_all_ranks = identical_on_all_ranks
        self.in_flight: dict[int, Any] = {}
        _OPEN[name] = self

    @abstractmethod
    def start(self, x: Tensor) -> Any:
        """Begin the sum of `x` over the ranks.

        Args:
            x: This rank's part, same shape and dtype on all ranks. It must not change until `wait` returns.

        Returns:
            A handle, to be given to `wait` once.
        """

    @abstractmethod
    def wait(self, handle: Any) -> Tensor:
        """The finished sum, with the shape and dtype of the part; it shares no memory with the part.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Concatenate the ranks' parts along `dim`, rank 0 first; `degree` times as long there. Never rounded.

        Args:
            x: This rank's part, same shape and dtype on all ranks.
            dim: May count from the end.

        Raises:
            RankFailedError: A peer went away or did not answer in time.
        """

    def close(self) -> None:
        """Release its resources; a second call does nothing. It cannot be used afterwards."""
        if _OPEN.get(self.name) is self:
            del _OPEN[self.name]

    def part_to_send(self, x: Tensor) -> Tensor:
        """The part in the form that is sent: contiguous, and rounded to `reduce_dtype` if that is the smaller type."""
        dtype = self.reduce_dtype
        if dtype is not None and dtype.itemsize < x.dtype.itemsize and x.is_floating_point():
            x = x.to(dtype)
        return x.contiguous()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied program talks to the same peers


_OPEN: dict[str, Communicator] = {}
"""By name, for compiled code, which can hold no objects: what a process has to keep somewhere."""


def communicator_named(name: str) -> Communicator:
    """The open communicator of that name.

    Raises:
        KeyError: There is none.
    """
    return _OPEN[name]


def find(name: str) -> Communicator | None:
    """The open communicator of that name, None if there is none."""
    return _OPEN.get(name)
