"""Write every lane's part of the weights, reading each source tensor once and holding few at a time."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.progress import Advance
from kraken_compiler.weights.io.safetensors_format import read_header
from kraken_compiler.weights.io.safetensors_writer import SafetensorsWriter, file_mark
from kraken_compiler.weights.lane_file_names import SHARED_FILE, lane_file_name
from kraken_compiler.weights.shard_journal import Mark, ShardJournal, finished_files

FORMAT = {"format": "pt", "kraken_weights": "2"}
READ_AHEAD_BYTES = 256 << 20
"""A source tensor up to this size is read while the ones before it are written; a larger one is read by rows."""
_PIECES_IN_FLIGHT = 2
"""Number of tensors, or parts of large ones, that are written at once."""
_ROWS_BYTES = 64 << 20
"""Number of bytes of a large tensor that are read at once."""


def write_lane_shards(
    program: Program, read: SourceReader, directory: Path, progress: Advance | None = None
) -> list[Path]:
    """Write the weights, keyed by placeholder name, and their journal.

    What lanes hold parts of goes to `lane-0.safetensors` ... `lane-(N-1).safetensors`, what all of them hold whole to
    `shared.safetensors`, once. Memory stays around the largest three tensors, whatever the size of a shard, and the
    lanes' parts of two of them, where those are no rows and have to be copied. Of a tensor larger than
    `READ_AHEAD_BYTES` some rows are held at a time, or the whole of it and no other. What an earlier call wrote into
    the directory is kept as far as its journal and the hashes say that it is whole: the caller must know that it was
    of the same values.

    Args:
        program: A lane program; its weight table says what each lane owns.
        read: Gives a whole source tensor (`program.constants` are read from the program itself), or rows of it, see
            `SourceReader`. Called for one after the other, perhaps in another thread.
        directory: An existing directory.
        progress: Told about every source tensor that is done.

    Returns:
        The files, lane 0 first, the shared one last.

    Raises:
        InputFileError: A source tensor cannot be read, or is not of the shape that the program needs.
        OSError: A file cannot be written; names it.
    """
    specs_by_source = by_source(program.weights.values())
    sources = list(specs_by_source)
    with ExitStack() as stack:
        shards = [_Shard.open(stack, directory, specs_by_source, lane) for lane in (*range(program.degree), None)]
        files = [shard.file for shard in shards]
        journal = ShardJournal(directory)
        finished_count = _resume(files, sources, journal)
        reader = program.reader(read)
        pieces = [piece for source in sources[finished_count:] for piece in _pieces(specs_by_source[source], reader)]
        pending_writes: deque[tuple[_Piece, list[Future[Mark]]]] = deque()
        done = finished_count

        def finish_oldest() -> None:
            nonlocal done
            piece, futures = pending_writes.popleft()
            marks = [future.result() for future in futures]
            if piece.last:
                journal.add(piece.source, marks)
                done += 1
                if progress is not None:
                    progress(done, len(sources), piece.source)

        for piece, tensor in _read_ahead(pieces):
            if piece.rows is None:
                _check_shape(piece.specs, tuple(tensor.shape))
            pending_writes.append((piece, [shard.submit(piece, tensor) for shard in shards]))
            most_pending = _PIECES_IN_FLIGHT - 1 if piece.nbytes <= READ_AHEAD_BYTES else 0
            del tensor
            while len(pending_writes) > most_pending:
                finish_oldest()
        while pending_writes:
            finish_oldest()
        journal.finish({file.path.name: file.mark for file in files})
    return [file.path for file in files]


def lane_files_with(
    program: Program, read: SourceReader, directory: Path, progress: Advance | None = None
) -> dict[Path, Mark]:
    """Lane files that hold a program's weights and perhaps more: those that are there already, or else new ones.

    Args:
        program, read, directory, progress: See `write_lane_shards`.

    Returns:
        The files, and their hashes.

    Raises:
        InputFileError, OSError: See `write_lane_shards`.
    """
    marks = finished_files(directory)
    if not _are_complete(marks, program, directory):
        write_lane_shards(program, read, directory, progress)
        marks = finished_files(directory)
    return marks


def _are_complete(files: Mapping[Path, Mark], program: Program, directory: Path) -> bool:
    """True if files are whole, hash for hash, and lanes find all their weights in them."""
    specs_by_source = by_source(program.weights.values())
    for lane in (*range(program.degree), None):
        path = directory / _file_name(lane)
        if path not in files or not path.is_file():
            return False
        entries = read_header(path)
        for spec in (spec for specs in specs_by_source.values() for spec in _file_specs(specs, lane)):
            entry = entries.get(spec.name)
            if entry is None or (entry.dtype, entry.shape) != (spec.torch_dtype, spec.shape):
                return False
    return all(file_mark(path) == mark for path, mark in files.items())


def _file_name(lane: int | None) -> str:
    return SHARED_FILE if lane is None else lane_file_name(lane)


def lane_parts(
    program: Program,
    specs: Iterable[WeightSpec],
    read: SourceReader,
    progress: Advance | None = None,
) -> Iterator[tuple[WeightSpec, int, Tensor]]:
    """Every lane's part of weights, reading each source tensor once and holding one at a time.

    Args:
        program: A lane program.
        specs: Rows of its weight table.
        read: Gives a whole source tensor (`program.constants` are read from the program itself).
        progress: Told about every source tensor that is done.

    Yields:
        A weight, a lane's number, and the lane's part in the weight's element type.

    Raises:
        InputFileError: A source tensor cannot be read, or is not of the shape that the program needs.
    """
    specs_by_source = by_source(specs)
    reader = program.reader(read)
    for done, (source, source_specs) in enumerate(specs_by_source.items(), start=1):
        tensor = reader(source)
        _check_shape(source_specs, tuple(tensor.shape))
        for spec in source_specs:
            for lane in range(program.degree):
                yield spec, lane, spec.take(tensor, lane).to(spec.torch_dtype)
        del tensor
        if progress is not None:
            progress(done, len(specs_by_source), source)


def by_source(specs: Iterable[WeightSpec]) -> dict[str, list[WeightSpec]]:
    """Rows of a weight table by the source tensor they are made of, in order of first appearance."""
    specs_by_source: dict[str, list[WeightSpec]] = defaultdict(list)
    for spec in specs:
        specs_by_source[spec.source].append(spec)
    return dict(specs_by_source)


@dataclass(frozen=True)
class _Shard:
    """One file and the thread that writes it.

    Attributes:
        file: The file.
        lane: Whose weights it holds; None for those that all lanes hold whole.
        thread: Writes one source tensor's parts after the other's.
    """

    file: SafetensorsWriter
    lane: int | None
    thread: ThreadPoolExecutor

    @classmethod
    def open(
        cls, stack: ExitStack, directory: Path, specs_by_source: Mapping[str, Sequence[WeightSpec]], lane: int | None
    ) -> Self:
        name = _file_name(lane)
        specs = [spec for specs in specs_by_source.values() for spec in _file_specs(specs, lane)]
        contents = {spec.name: (spec.torch_dtype, spec.shape) for spec in specs}
        metadata = FORMAT | {"lane": "all" if lane is None else str(lane)}
        file = stack.enter_context(closing(SafetensorsWriter(directory / name, contents, metadata)))
        return cls(file, lane, stack.enter_context(ThreadPoolExecutor(1, "write-shard")))

    def submit(self, piece: _Piece, tensor: Tensor) -> Future[Mark]:
        """Write what this file holds of a piece; gives how far the file then is."""
        return self.thread.submit(self._write, piece, tensor)

    def _write(self, piece: _Piece, tensor: Tensor) -> Mark:
        lane = self.lane or 0
        for spec in _file_specs(piece.specs, self.lane):
            if piece.rows is None:
                self.file.append(spec.name, spec.take(tensor, lane).to(spec.torch_dtype))
            else:
                self.file.append_rows(spec.name, spec.take_rows(tensor, piece.rows[0], lane).to(spec.torch_dtype))
        return self.file.mark


def _file_specs(specs: Iterable[WeightSpec], lane: int | None) -> list[WeightSpec]:
    """The weights that a lane's file holds; those of the shared file if there is no lane."""
    return [spec for spec in specs if spec.shared == (lane is None)]


@dataclass(frozen=True)
class _Piece:
    """A unit of reading: a source tensor, or some rows of a large one.

    Attributes:
        specs: What is made of the tensor.
        read: Reads the piece.
        rows: First row and the one after the last; None for a whole tensor.
        nbytes: Its size, should the source have the weights' element type.
    """

    specs: Sequence[WeightSpec]
    read: Callable[[], Tensor]
    rows: tuple[int, int] | None
    nbytes: int

    @property
    def source(self) -> str:
        """The tensor's name."""
        return self.specs[0].source

    @property
    def last(self) -> bool:
        """True if all of the tensor has been read with this."""
        return self.rows is None or self.rows[1] == self.specs[0].source_shape[0]


def _pieces(specs: Sequence[WeightSpec], reader: SourceReader) -> Iterator[_Piece]:
    """The pieces of the source tensor that weights are made of, in order."""
    source, shape = specs[0].source, specs[0].source_shape
    nbytes = math.prod(shape) * specs[0].torch_dtype.itemsize
    # A file's tensors lie one behind the other, so of two that are made of the same source none can be written by rows.
    alone = len(specs) == len({spec.shared for spec in specs})
    by_rows = nbytes > READ_AHEAD_BYTES and alone and all(spec.is_cut_by_rows for spec in specs)
    rows = reader.rows_of(source) if by_rows else None
    if rows is None:
        yield _Piece(specs, partial(reader, source), None, nbytes)
        return
    _check_shape(specs, rows.shape)
    count, row_bytes = shape[0], nbytes // shape[0]
    step = max(1, _ROWS_BYTES // row_bytes)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield _Piece(specs, partial(rows.read, start, stop), (start, stop), (stop - start) * row_bytes)


def _resume(files: Sequence[SafetensorsWriter], sources: Sequence[str], journal: ShardJournal) -> int:
    """Keep what an earlier writer finished; returns how many source tensors that are."""
    marks_by_source = journal.marks(len(files))[: len(sources)]
    with ThreadPoolExecutor(len(files), "hash-shard") as pool:
        marks_by_file = [[marks[at] for marks in marks_by_source] for at in range(len(files))]
        finished_count = min(pool.map(SafetensorsWriter.matching, files, marks_by_file))
    journal.restart(sources, marks_by_source[:finished_count])
    for file in files:
        file.cut(finished_count)
    return finished_count


def _read_ahead(pieces: Sequence[_Piece]) -> Iterator[tuple[_Piece, Tensor]]:
    """The pieces and their tensors, in order; the next piece is read while the caller works, unless it is large."""
    with ThreadPoolExecutor(1, "read-source") as pool:
        pending = pool.submit(pieces[0].read) if pieces else None
        for piece, following in zip(pieces, [*pieces[1:], None]):
            tensor = pending.result() if pending is not None else piece.read()
            pending = None
            if following is not None and following.nbytes <= READ_AHEAD_BYTES:
                pending = pool.submit(following.read)
            yield piece, tensor
            del tensor


def _check_shape(specs: Iterable[WeightSpec], shape: tuple[int, ...]) -> None:
    for spec in specs:
        if shape != spec.source_shape:
            raise InputFileError(
                f"weight '{spec.source}' has shape {list(shape)}, the program needs {list(spec.source_shape)}"
            )
