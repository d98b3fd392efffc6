"""Where weight values come from: the seam between capture, which knows the files, and everything that needs numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from kraken_compiler.ir.source_reader import SourceReader, SourceRows


class WeightStore(Protocol):
    """Tensors by source name, read one at a time and never kept."""

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU.

        Raises:
            InputFileError: The file that holds it is missing, truncated or lacks it.
        """
        ...

    def rows_of(self, name: str) -> SourceRows | None:
        """The tensor by rows; None if the whole of it must be read to have any."""
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


def reader_of(store: WeightStore) -> SourceReader:
    """What gives a store's tensors, whole or by rows."""
    return SourceReader(store.read, store.rows_of)


class MemoryStore:
    """A store over tensors that are already in memory, e.g. the state of an `nn.Module`; nothing is copied."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()

    def rows_of(self, name: str) -> SourceRows | None:
        tensor = self._tensors[name].detach()
        return SourceRows(tuple(tensor.shape), lambda start, stop: tensor[start:stop].cpu())

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def release(self) -> None:
        """Reading keeps nothing."""

    def validate(self) -> None:
        """Tensors in memory are what the model was captured with."""
