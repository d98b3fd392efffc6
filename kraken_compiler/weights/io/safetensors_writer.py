"""A safetensors file that is written from its beginning to its end while its hash is computed."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kraken_compiler.errors import InputFileError, naming
from kraken_compiler.weights.io.buffers import aligned_buffer
from kraken_compiler.weights.io.direct_io import BLOCK, open_direct
from kraken_compiler.weights.io.safetensors_format import byte_view, encode_header
from kraken_compiler.weights.shard_journal import Mark

_CHUNK = 4 << 20
"""Number of bytes that are hashed and written at a time."""


def file_mark(path: Path) -> Mark:
    """The mark at a file's end: its length and its hash.

    Raises:
        OSError: It cannot be read; names it.
    """
    with naming(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Mark(os.fstat(file.fileno()).st_size, digest)


@contextmanager
def new_safetensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Iterator[SafetensorsWriter]:
    """A safetensors file that the block writes whole; an existing one is replaced.

    Args:
        path: The file.
        tensors: Name -> element type and shape, in the order in which they will be appended.
        metadata: Free text pairs for the header.

    Raises:
        InputFileError: It cannot be written.
    """
    try:
        with closing(SafetensorsWriter(path, tensors, metadata or {})) as writer:
            writer.cut(0)
            yield writer
            writer.require_complete()
    except OSError as error:
        raise InputFileError(f"cannot write {error.filename or path}: {error.strerror or error}") from error


class SafetensorsWriter:
    """A safetensors file whose tensors are known in advance and arrive in the order of the header.

    Args:
        path: The file; what an earlier writer left in it stays until `cut`.
        tensors: Name -> element type and shape.
        metadata: Free text pairs for the header.

    Raises:
        OSError: The file cannot be read or written; names it (from every method).
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._head, self._positions = encode_header(self._tensors, metadata)
        self._end = 0
        self._hash = hashlib.sha256()
        self._states: list[tuple[int, hashlib._Hash]] = []
        with naming(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._direct = open_direct(path)
        self._block = aligned_buffer(_CHUNK)
        self._writer = ThreadPoolExecutor(1, "write-block")

    @property
    def mark(self) -> Mark:
        """The position up to which the file is written, and the hash so far."""
        return Mark(self._end, self._hash.hexdigest())

    def matching(self, marks: Sequence[Mark]) -> int:
        """Count the marks of an earlier writer, from the first one on, that are true of what is in the file."""
        state, position, count = hashlib.sha256(), 0, 0
        self._states = []
        with naming(self.path):
            if os.pread(self._file, len(self._head), 0) != self._head:
                return 0
            for mark in marks:
                while position < mark.end:
                    piece = os.pread(self._file, min(_CHUNK, mark.end - position), position)
                    if not piece:
                        return count
                    state.update(piece)
                    position += len(piece)
                if position != mark.end or state.hexdigest() != mark.sha256:
                    return count
                self._states.append((position, state.copy()))
                count += 1
        return count

    def cut(self, marks: int) -> None:
        """Keep the file up to the last of so many matching marks, and begin anew if there are none."""
        if marks:
            self._end, self._hash = self._states[marks - 1]
        with naming(self.path):
            os.ftruncate(self._file, self._end)
        self._states = []
        if not marks:
            self._append(memoryview(self._head))

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, whose element type and shape must be those given at construction."""
        _, shape = self._tensors[name]
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} instead of {shape}"
        assert self._end == self._positions[name], f"{name} does not come next"
        self.append_rows(name, tensor)

    def append_rows(self, name: str, rows: Tensor) -> None:
        """Write the next rows of the next tensor, whose others come later."""
        dtype, shape = self._tensors[name]
        assert rows.dtype == dtype, f"{name}: {rows.dtype} instead of {dtype}"
        done = self._end - self._positions[name]
        assert 0 <= done <= math.prod(shape) * dtype.itemsize - rows.nbytes, f"{name} does not come next"
        if rows.numel():
            self._append(byte_view(rows.cpu().contiguous()))

    def require_complete(self) -> None:
        """Make sure that every tensor is written."""
        ends = {
            name: self._positions[name] + math.prod(shape) * dtype.itemsize
            for name, (dtype, shape) in self._tensors.items()
        }
        missing = [name for name, end in ends.items() if end > self._end]
        assert not missing, f"never written: {missing[:3]}"

    def close(self) -> None:
        self._writer.shutdown()
        with naming(self.path):
            os.close(self._file)
            if self._direct is not None:
                os.close(self._direct)

    def _append(self, data: memoryview) -> None:
        # Piece by piece, each of which is written while the next one is hashed; whole blocks of the file go to the disk
        # directly.
        pending: Future[None] | None = None
        while data:
            before = -self._end % BLOCK
            size = before or min(_CHUNK, len(data) - len(data) % BLOCK) or len(data)
            piece = data[:size]
            self._hash.update(piece)
            if pending is not None:
                pending.result()
            pending = self._writer.submit(self._write, piece, self._end)
            self._end += len(piece)
            data = data[size:]
        if pending is not None:
            pending.result()

    def _write(self, piece: memoryview, start: int) -> None:
        with naming(self.path):
            done = 0
            if self._direct is not None and len(piece) % BLOCK == 0:
                done = self._write_directly(piece, start, self._direct)
            while done < len(piece):
                done += os.pwrite(self._file, piece[done:], start + done)

    def _write_directly(self, blocks: memoryview, start: int, file: int) -> int:
        """Write whole blocks past the page cache; returns how many bytes of them."""
        aligned = memoryview(self._block)[: len(blocks)]
        # Other threads run in the meantime, which they do not while memoryviews are copied.
        np.copyto(np.frombuffer(aligned, np.uint8), np.frombuffer(blocks, np.uint8))
        try:
            return os.pwrite(file, aligned, start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0  # a limit within the blocks, or a disk of larger ones: the usual way says why, or does it
