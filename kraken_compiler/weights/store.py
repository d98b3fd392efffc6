"""Weight stores: the interface between capture, which knows the files, and everything that needs numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from kraken_compiler.ir.source_reader import SourceReader, SourceRows


class WeightStore(Protocol):
    """Tensors by source name, read one at a time and never kept."""

    @property
    def read(self) -> SourceReader:
        """The reader of the tensors, on the CPU.

        It raises InputFileError where the file that holds a tensor is missing, truncated or lacks it.
        """
        ...

    def names(self) -> tuple[str, ...]:
        """Every source name that `read` accepts."""
        ...

    def release(self) -> None:
        """Give back the memory that reading keeps for the next time."""
        ...

    def validate(self) -> None:
        """Check that every tensor is there with the shape the model needs, without reading values.

        Raises:
            InputFileError: One is not; the message names it and the file.
        """
        ...


class MemoryStore:
    """A store over tensors that are already in memory, e.g. the state of an `nn.Module`; nothing is copied."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def read(self) -> SourceReader:
        return SourceReader(lambda name: self._tensors[name].detach().cpu(), self._rows_of)

    def _rows_of(self, name: str) -> SourceRows:
        tensor = self._tensors[name].detach()
        return SourceRows(tuple(tensor.shape), lambda start, stop: tensor[start:stop].cpu())

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def release(self) -> None:
        """Do nothing: reading keeps no memory."""

    def validate(self) -> None:
        """Check nothing: the tensors are those that the model was captured with."""
