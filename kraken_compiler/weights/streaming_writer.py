"""Write a safetensors file tensor by tensor, so that the file never has to fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.safetensors_format import byte_view, encode_header


class StreamingSafetensorsWriter:
    """A safetensors file whose tensors are known in advance and arrive one at a time, in any order.

    Args:
        path: The file; an existing one is replaced.
        tensors: Name -> element type and shape; the data lies in this order.
        metadata: Free text pairs for the header.

    Raises:
        InputFileError: The file cannot be written (also from `write` and on leaving the `with` block).
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._tensors = dict(tensors)
        self._missing = set(tensors)
        head, self._positions = encode_header(self._tensors, metadata or {})
        try:
            # Unbuffered: every write is one large tensor, and an error must surface at the tensor that met it.
            self._file = path.open("wb", buffering=0)
            self._write_all(0, memoryview(head))
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, whose element type and shape must be those given at construction."""
        dtype, shape = self._tensors[name]
        assert tensor.dtype == dtype, f"{name}: {tensor.dtype} instead of {dtype}"
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} instead of {shape}"
        try:
            self._write_all(self._positions[name], byte_view(tensor.cpu().contiguous()))
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self._missing.discard(name)

    def close(self) -> None:
        """Finish the file; every tensor must have been written."""
        try:
            self._file.close()
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def _write_all(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:]) or 0


def _cannot_write(path: Path, error: OSError) -> InputFileError:
    return InputFileError(f"cannot write {path}: {error.strerror or error}")
