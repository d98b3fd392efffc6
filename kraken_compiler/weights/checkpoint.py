"""Readers of the weight files next to a `config.json`: names and shapes first, values one tensor at a time."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError, first_line
from kraken_compiler.weights.io.buffers import Buffers
from kraken_compiler.weights.io.direct_io import would_flood_the_cache
from kraken_compiler.weights.io.safetensors_format import TensorEntry, read_header, read_tensor

_COMPARED_ELEMENTS = 16 << 20
"""Number of a tensor's elements that are compared at a time."""
_SMALLEST_BUFFER, _BUFFERS = 2 << 20, 4
"""The memory that is kept between reads: one that is read into, two that are written from, one for whoever is late."""


class Checkpoint(Protocol):
    """Tensors under the names that the files give them."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, sorted."""
        ...

    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        ...

    def describe(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Element type and shape, without reading the tensor."""
        ...

    def file_of(self, key: str) -> Path:
        """The file that holds the tensor."""
        ...

    def read(self, key: str) -> Tensor:
        """The tensor's values."""
        ...

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """The values along the first dim from `start` to before `stop`."""
        ...

    def release(self) -> None:
        """Give back the memory that reading keeps for the next time."""
        ...


class SafetensorsCheckpoint:
    """One or more safetensors files, opened by reading their headers only."""

    def __init__(self, files: tuple[Path, ...], entries: Mapping[str, TensorEntry]) -> None:
        self.files = files
        self._entries = dict(entries)
        self._buffers = Buffers(_SMALLEST_BUFFER, _BUFFERS)
        self._floods_cache = would_flood_the_cache(files)
        self._past_reads: set[TensorEntry] = set()

    @classmethod
    def open(cls, files: tuple[Path, ...]) -> SafetensorsCheckpoint:
        """Read the headers of `files`.

        Raises:
            InputFileError: A file is missing, truncated or damaged, or two files hold a tensor with different values.
        """
        entries: dict[str, TensorEntry] = {}
        duplicates: list[tuple[str, TensorEntry]] = []
        for path in files:
            header = read_header(path)
            duplicates += [(key, entries[key]) for key in header if key in entries]
            entries.update(header)
        checkpoint = cls(files, entries)
        for key, other in duplicates:
            copy = cls((other.path,), {key: other})
            if not same_values(Rows.of(checkpoint, key), Rows.of(copy, key)):
                raise _conflict_error(key, other.path, entries[key].path)
        return checkpoint

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def describe(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        entry = self._entries[key]
        return entry.dtype, entry.shape

    def file_of(self, key: str) -> Path:
        return self._entries[key].path

    def read(self, key: str) -> Tensor:
        return self._read_entry(key, self._entries[key])

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._read_entry(key, self._entries[key].rows(start, stop))

    def release(self) -> None:
        self._buffers.release()

    def _read_entry(self, key: str, entry: TensorEntry) -> Tensor:
        # Whoever reads something again may read it many times.
        is_first_read = entry not in self._past_reads
        self._past_reads.add(entry)
        return read_tensor(key, entry, self._buffers, direct=self._floods_cache and is_first_read)


class PickledCheckpoint:
    """`pytorch_model.bin` files, opened with torch's restricted unpickler and mapped rather than read."""

    def __init__(self, files: tuple[Path, ...], tensors: Mapping[str, tuple[Path, Tensor]]) -> None:
        self.files = files
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, files: tuple[Path, ...]) -> PickledCheckpoint:
        """Map the tensors of `files`.

        Raises:
            InputFileError: A file is missing, damaged, or holds something else than tensors, or two files hold a tensor
                with different values.
        """
        tensors: dict[str, tuple[Path, Tensor]] = {}
        for path in files:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise InputFileError(f"cannot read {path}: {first_line(error)}") from error
            if not isinstance(state, Mapping):
                raise InputFileError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
            file_tensors = {key: (path, value) for key, value in state.items() if isinstance(value, Tensor)}
            for key in file_tensors.keys() & tensors.keys():
                (other, earlier), (_, value) = tensors[key], file_tensors[key]
                if earlier.dtype != value.dtype or not torch.equal(earlier, value):
                    raise _conflict_error(key, other, path)
            tensors.update(file_tensors)
        return cls(files, tensors)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def describe(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        tensor = self._tensors[key][1]
        return tensor.dtype, tuple(tensor.shape)

    def file_of(self, key: str) -> Path:
        return self._tensors[key][0]

    def read(self, key: str) -> Tensor:
        # A copy, so that the pages of the mapped file do not stay with the caller.
        return self._tensors[key][1].detach().clone()

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._tensors[key][1][start:stop].detach().clone()

    def release(self) -> None:
        """Do nothing: the system drops mapped pages itself."""


@dataclass(frozen=True)
class Rows:
    """A tensor that is read by rows.

    Attributes:
        dtype, shape: Of the whole; a scalar is read whole.
        read: Gives the rows from one number to before another.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint, key: str, dtype: torch.dtype | None = None) -> Rows:
        """A tensor of a checkpoint, as `dtype` if one is given."""
        file_dtype, shape = checkpoint.describe(key)

        def read(start: int, stop: int) -> Tensor:
            values = checkpoint.read_rows(key, start, stop) if shape else checkpoint.read(key)
            return values if dtype is None else values.to(dtype)

        return cls(dtype or file_dtype, shape, read)


def same_values(one: Rows, other: Rows) -> bool:
    """True if two tensors are equal, bit by bit but for the sign of zeros; a few rows at a time are in memory."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if 0 in one.shape:
        return True
    count = one.shape[0] if one.shape else 1
    step = max(1, _COMPARED_ELEMENTS // math.prod(one.shape[1:]))
    return all(
        torch.equal(_comparable(one.read(start, stop)), _comparable(other.read(start, stop)))
        for start, stop in ((start, min(start + step, count)) for start in range(0, count, step))
    )


def _comparable(values: Tensor) -> Tensor:
    # torch cannot compare numbers of 8 bits; as floats they are the same.
    return values.float() if values.is_floating_point() and values.itemsize == 1 else values


def _conflict_error(key: str, first: Path, second: Path) -> InputFileError:
    return InputFileError(
        f"tensor '{key}' is in two files with different values, {first} and {second.name}: they are of different saves"
    )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
