"""A weight store over checkpoint files: a model's tensor names, mapped to what the files hold, read lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.source_reader import SourceReader, SourceRows
from kraken_compiler.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint, and the conversion, that one tensor of the model is made from.

    Attributes:
        keys: The checkpoint's tensors that it needs.
        convert: Makes the tensor from a function that reads a key; None if `keys` holds the tensor as it is.
    """

    keys: tuple[str, ...]
    convert: Callable[[Callable[[str], Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor's element type and shape in the model's graph."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointStore:
    """A model's tensors by qualified name, read from checkpoint files one at a time and never kept.

    Args:
        checkpoint: The files; None if there are none, and then only `names` works.
        sources: Tensor name -> what it is made from; a name that is missing here has no values in the files.
        expected: Tensor name -> what the model needs; floating-point values are cast to its element type.
        location: Where the weights are or should be, for messages.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        sources: Mapping[str, TensorSource],
        expected: Mapping[str, ExpectedTensor],
        location: Path,
    ) -> None:
        self._checkpoint = checkpoint
        self._sources = dict(sources)
        self._expected = dict(expected)
        self._location = location

    def names(self) -> tuple[str, ...]:
        return tuple(self._expected)

    def release(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.release()

    def validate(self) -> None:
        """Check names, shapes and element types against the files' headers; no tensor is read.

        Raises:
            InputFileError: A tensor is missing or has another shape, or the directory has no weight files.
        """
        missing = [name for name in self._expected if name not in self._sources]
        if self._checkpoint is None or missing:
            raise self._missing_error(missing)
        for name, expected in self._expected.items():
            source = self._sources[name]
            if source.convert is None:
                self._check(name, expected, self._checkpoint, source.keys[0])

    @property
    def read(self) -> SourceReader:
        return SourceReader(self._read_whole, self._rows_of)

    def _rows_of(self, name: str) -> SourceRows | None:
        source = self._sources.get(name)
        checkpoint = self._checkpoint
        if checkpoint is None or source is None or source.convert is not None:
            return None
        key, expected = source.keys[0], self._expected[name]
        self._check(name, expected, checkpoint, key)
        return SourceRows(expected.shape, lambda start, stop: checkpoint.read_rows(key, start, stop).to(expected.dtype))

    def _read_whole(self, name: str) -> Tensor:
        source = self._sources.get(name)
        if self._checkpoint is None or source is None:
            raise self._missing_error([name])
        expected = self._expected[name]
        if source.convert is None:
            self._check(name, expected, self._checkpoint, source.keys[0])
            tensor = self._checkpoint.read(source.keys[0])
        else:
            tensor = source.convert(self._checkpoint.read)
        if tuple(tensor.shape) != expected.shape:
            raise self._shape_error(name, expected, tuple(tensor.shape), self._checkpoint.file_of(source.keys[0]))
        return tensor.to(expected.dtype)

    def _check(self, name: str, expected: ExpectedTensor, checkpoint: Checkpoint, key: str) -> None:
        dtype, shape = checkpoint.describe(key)
        if shape != expected.shape:
            raise self._shape_error(name, expected, shape, checkpoint.file_of(key))
        if dtype is None or dtype.is_floating_point != expected.dtype.is_floating_point:
            file_type = "an unknown element type" if dtype is None else str(dtype).removeprefix("torch.")
            model_type = str(expected.dtype).removeprefix("torch.")
            raise InputFileError(
                f"{checkpoint.file_of(key)}: tensor '{key}' is {file_type}, the model needs {model_type}"
            )

    @staticmethod
    def _shape_error(name: str, expected: ExpectedTensor, shape: tuple[int, ...], path: Path) -> InputFileError:
        return InputFileError(
            f"{path}: tensor '{name}' has shape {list(shape)}, the model's config needs {list(expected.shape)}"
        )

    def _missing_error(self, missing: list[str]) -> InputFileError:
        if self._checkpoint is None:
            return InputFileError(f"{self._location} has no weight files (*.safetensors), only a config")
        files = self._checkpoint.files
        place = str(files[0]) if len(files) == 1 else f"the {len(files)} weight files of {self._location}"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return InputFileError(f"tensor '{missing[0]}'{more} of the model is missing from {place}")
