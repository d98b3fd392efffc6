"""The reader of a source's tensors by name, whole or by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # ranks without torch read weight tables too
    from torch import Tensor


@dataclass(frozen=True)
class SourceRows:
    """A source tensor that can be read by rows.

    Attributes:
        shape: The whole tensor's.
        read: Gives the rows from one number to before another.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class SourceReader:
    """Reader of a source's tensors: called with a name it gives the whole of one.

    It is called for one tensor at a time, perhaps in another thread, and nothing read is to be kept.

    Attributes:
        whole: Gives a whole tensor.
        rows_of: Gives a tensor's rows; None for a tensor of which all must be read to have any.
    """

    whole: Callable[[str], Tensor]
    rows_of: Callable[[str], SourceRows | None] = lambda name: None

    def __call__(self, name: str) -> Tensor:
        return self.whole(name)
