"""What gives a program the source's tensors, whole or by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """Gives source tensors by name. Whoever only wants whole ones can take it for a function.

    Attributes:
        whole: Gives a whole tensor.
        rows_of: Gives a tensor's rows; None for a tensor of which all must be read to have any.
    """

    whole: Callable[[str], Tensor]
    rows_of: Callable[[str], SourceRows | None] = lambda name: None

    @classmethod
    def of(cls, read: Callable[[str], Tensor]) -> SourceReader:
        """A function that gives whole tensors, or a reader that was taken for one."""
        return read if isinstance(read, SourceReader) else cls(read)

    def __call__(self, name: str) -> Tensor:
        return self.whole(name)
