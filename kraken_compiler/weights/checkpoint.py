"""Weight files next to a `config.json`: which tensors they hold, and one tensor at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.buffers import Buffers
from kraken_compiler.weights.direct_io import would_flood_the_cache
from kraken_compiler.weights.safetensors_format import TensorEntry, read_header, read_tensor


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
        """The file that holds it."""
        ...

    def read(self, key: str) -> Tensor:
        """The tensor's values."""
        ...

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Those along the first dim from `start` to before `stop`."""
        ...

    def release(self) -> None:
        """Give back the memory that reading keeps for the next time."""
        ...


class SafetensorsCheckpoint:
    """One or more safetensors files, opened by reading their headers only."""

    def __init__(self, files: tuple[Path, ...], entries: Mapping[str, TensorEntry]) -> None:
        self.files = files
        self._entries = dict(entries)
        self._buffers = Buffers()
        self._flooding = would_flood_the_cache(files)
        self._read: set[TensorEntry] = set()

    @classmethod
    def open(cls, files: tuple[Path, ...]) -> SafetensorsCheckpoint:
        """Read the headers of `files`.

        Raises:
            InputFileError: A file is missing, truncated or damaged.
        """
        entries: dict[str, TensorEntry] = {}
        for path in files:
            entries.update(read_header(path))
        return cls(files, entries)

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
        once = entry not in self._read
        self._read.add(entry)
        return read_tensor(key, entry, self._buffers, direct=self._flooding and once)


class PickledCheckpoint:
    """`pytorch_model.bin` files, opened with torch's restricted unpickler and mapped rather than read."""

    def __init__(self, files: tuple[Path, ...], tensors: Mapping[str, tuple[Path, Tensor]]) -> None:
        self.files = files
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, files: tuple[Path, ...]) -> PickledCheckpoint:
        """Map the tensors of `files`.

        Raises:
            InputFileError: A file is missing, damaged, or holds something else than tensors.
        """
        tensors: dict[str, tuple[Path, Tensor]] = {}
        for path in files:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise InputFileError(f"cannot read {path}: {_first_line(error)}") from error
            if not isinstance(state, Mapping):
                raise InputFileError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
            tensors.update((key, (path, value)) for key, value in state.items() if isinstance(value, Tensor))
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
        """What is mapped is the system's to drop."""


def weight_files(directory: Path, suffix: str, index_name: str, single_name: str) -> tuple[Path, ...]:
    """The weight files of a model directory: those of the index, else the single file, else every `*suffix`.

    Raises:
        InputFileError: The index is damaged or names a file that is not there.
    """
    index = directory / index_name
    if not index.exists():
        single = directory / single_name
        return (single,) if single.exists() else tuple(sorted(directory.glob(f"*{suffix}")))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = tuple(directory / Path(name).name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"{index} is damaged: it does not map tensors to files") from error
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputFileError(
            f"{directory}: {len(missing)} of {len(paths)} weight files are missing ({shown}), {index.name} names them"
        )
    return paths


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
