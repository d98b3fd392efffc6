"""The safetensors file format, as far as reading headers and writing files tensor by tensor needs it.

    8 bytes      length of the header, little endian
    header       JSON: tensor name -> {"dtype", "shape", "data_offsets"}, padded with spaces to 8 bytes
    data         the tensors, one behind the other, C order; offsets count from here

We read and write it ourselves because the safetensors package maps whole files (its pages count as resident memory)
and saves only what is completely in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kraken_compiler.errors import InputFileError, os_errors_as
from kraken_compiler.weights.io.buffers import Buffers, aligned_buffer
from kraken_compiler.weights.io.direct_io import BLOCK, LargeFile

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The limit the safetensors package sets itself; a longer header is a damaged file."""


@dataclass(frozen=True)
class TensorEntry:
    """The location of one tensor in a file.

    Attributes:
        path: The file.
        dtype: Element type; None if torch has none for it.
        shape: Sizes.
        start: First byte, counted from the beginning of the file.
        nbytes: Length in bytes.
    """

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def rows(self, start: int, stop: int) -> TensorEntry:
        """The location of the rows from `start` to before `stop` along the first dim."""
        count, *rest = self.shape
        assert 0 <= start < stop <= count, f"rows {start} to {stop} of {count}"
        size = self.nbytes // count
        return replace(self, shape=(stop - start, *rest), start=self.start + start * size, nbytes=(stop - start) * size)


class _DuplicateNameError(ValueError):
    """Error for a name that stands twice in a JSON object."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file, from its header alone.

    Raises:
        InputFileError: The file is missing, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise InputFileError(f"{path} is truncated or no safetensors file: its header is incomplete")
            header = json.loads(file.read(length), object_pairs_hook=_unique_fields)
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror or error}") from error
    except _DuplicateNameError as error:
        raise InputFileError(f"{path} is damaged: its header has '{error}' twice") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} is damaged or no safetensors file: its header is not JSON") from error
    try:
        entries = {
            str(name): _entry(path, 8 + length, fields) for name, fields in header.items() if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputFileError(f"{path} is damaged: its header does not describe tensors") from error
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise InputFileError(f"{path} is truncated: its header describes {end} bytes, the file has {size}")
    return entries


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _DuplicateNameError(name)
        fields[name] = value
    return fields


def _entry(path: Path, data_start: int, fields: Mapping[str, object]) -> TensorEntry:
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and offsets must be lists")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        raise ValueError("shape and offsets must be whole numbers that fit 63 bits")
    start, stop = offsets
    dtype = DTYPES.get(str(fields["dtype"]))
    sizes = tuple(shape)
    if not 0 <= start <= stop or (dtype is not None and stop - start != math.prod(sizes) * dtype.itemsize):
        raise ValueError("offsets do not fit the shape")
    return TensorEntry(path, dtype, sizes, data_start + start, stop - start)


def read_tensor(name: str, entry: TensorEntry, buffers: Buffers | None = None, *, direct: bool = False) -> torch.Tensor:
    """One tensor, copied out of its file.

    Args:
        name: Its name, for messages.
        entry: Where it lies.
        buffers: Where to copy it to; None takes fresh memory.
        direct: Leave the system's page cache as it is.

    Raises:
        InputFileError: The file cannot be read, is shorter than it was, or holds an element type torch does not have.
    """
    if entry.dtype is None:
        raise InputFileError(f"{entry.path}: tensor '{name}' has an element type that torch does not know")
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    # Whole blocks of the file, among which the tensor is.
    before = entry.start % BLOCK
    size = -(-(before + entry.nbytes) // BLOCK) * BLOCK
    memory = aligned_buffer(size) if buffers is None else buffers.take(size)
    with os_errors_as(f"cannot read {entry.path}"), LargeFile(entry.path, direct=direct) as file:
        count = file.read(memoryview(memory)[:size], entry.start - before)
    if count < before + entry.nbytes:
        raise InputFileError(f"{entry.path} is truncated: tensor '{name}' is incomplete")
    content = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=before)
    if before % entry.dtype.itemsize:
        content = content.clone()  # a header of an odd length: elements must lie where their type may begin
    return content.view(entry.dtype).reshape(entry.shape)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Header of a file that holds these tensors in this order.

    Args:
        tensors: Name -> element type and shape.
        metadata: Free text pairs.

    Returns:
        The bytes in front of the data, and the position of every tensor in the file.
    """
    offset = 0
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    positions: dict[str, int] = {}
    position = len(head)
    for name, (dtype, shape) in tensors.items():
        positions[name] = position
        position += math.prod(shape) * dtype.itemsize
    return head, positions
