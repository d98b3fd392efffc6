"""Write every lane's part of the weights, reading each source tensor once and holding few at a time."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.progress import Advance
from kraken_compiler.weights.shard_file import ShardFile
from kraken_compiler.weights.shard_journal import Mark, ShardJournal

FORMAT = {"format": "pt", "kraken_weights": "2"}
SHARED_FILE = "shared.safetensors"
"""Name of the file with the weights that all lanes hold whole."""
READ_AHEAD_BYTES = 256 << 20
"""A source tensor up to this size is read while the ones before it are written."""
_TENSORS_IN_FLIGHT = 2
"""So many tensors of that size are written at once."""


def lane_file_name(lane: int) -> str:
    """Name of the file with the weights that are a lane's own."""
    return f"lane-{lane}.safetensors"


def write_lane_shards(
    program: Program, read: Callable[[str], Tensor], directory: Path, progress: Advance | None = None
) -> list[Path]:
    """Write the weights, keyed by placeholder name, and their journal.

    What lanes hold parts of goes to `lane-0.safetensors` ... `lane-(N-1).safetensors`, what all of them hold whole to
    `shared.safetensors`, once. Memory stays around the largest three tensors, whatever the size of a shard; around the
    largest alone if that is larger than `READ_AHEAD_BYTES`. What an earlier call wrote into the directory is kept as
    far as its journal and the hashes say that it is whole: the caller must know that it was of the same values.

    Args:
        program: A lane program; its weight table says what each lane owns.
        read: Gives a whole source tensor (`program.constants` are read from the program itself). Called in one other
            thread, one call after the other.
        directory: An existing directory.
        progress: Told about every source tensor that is done.

    Returns:
        The files, lane 0 first, the shared one last.

    Raises:
        InputFileError: A source tensor cannot be read, or is not of the shape that the program needs.
        OSError: A file cannot be written; names it.
    """
    by_source = _by_source(program.weights.values())
    sources = list(by_source)
    with ExitStack() as stack:
        shards = [_Shard.open(stack, directory, by_source, lane) for lane in (*range(program.degree), None)]
        files = [shard.file for shard in shards]
        journal = ShardJournal(directory)
        kept = _resume(files, sources, journal)
        tensors = _read_ahead(program.reader(read), {source: by_source[source] for source in sources[kept:]})
        writing: deque[tuple[str, list[Future[Mark]]]] = deque()
        done = kept

        def finish_oldest() -> None:
            nonlocal done
            source, marks = writing.popleft()
            journal.add(source, [mark.result() for mark in marks])
            done += 1
            if progress is not None:
                progress(done, len(sources), source)

        for source, tensor in tensors:
            specs = by_source[source]
            for spec in specs:
                _check_shape(spec, tensor)
            writing.append((source, [shard.submit(specs, tensor) for shard in shards]))
            allowed = _TENSORS_IN_FLIGHT - 1 if tensor.nbytes <= READ_AHEAD_BYTES else 0
            del tensor
            while len(writing) > allowed:
                finish_oldest()
        while writing:
            finish_oldest()
        journal.finish({file.path.name: file.mark for file in files})
    return [file.path for file in files]


def lane_parts(
    program: Program,
    specs: Iterable[WeightSpec],
    read: Callable[[str], Tensor],
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
    by_source = _by_source(specs)
    reader = program.reader(read)
    for done, (source, of_source) in enumerate(by_source.items(), start=1):
        tensor = reader(source)
        for spec in of_source:
            _check_shape(spec, tensor)
            for lane in range(program.degree):
                yield spec, lane, spec.take(tensor, lane).to(spec.torch_dtype)
        del tensor
        if progress is not None:
            progress(done, len(by_source), source)


def _by_source(specs: Iterable[WeightSpec]) -> dict[str, list[WeightSpec]]:
    by_source: dict[str, list[WeightSpec]] = defaultdict(list)
    for spec in specs:
        by_source[spec.source].append(spec)
    return dict(by_source)


@dataclass(frozen=True)
class _Shard:
    """One file and the thread that writes it.

    Attributes:
        file: The file.
        lane: Whose weights it holds; None for those that all lanes hold whole.
        thread: Writes one source tensor's parts after the other's.
    """

    file: ShardFile
    lane: int | None
    thread: ThreadPoolExecutor

    @classmethod
    def open(
        cls, stack: ExitStack, directory: Path, by_source: Mapping[str, Sequence[WeightSpec]], lane: int | None
    ) -> Self:
        name = SHARED_FILE if lane is None else lane_file_name(lane)
        specs = [spec for specs in by_source.values() for spec in specs if spec.shared == (lane is None)]
        contents = {spec.name: (spec.torch_dtype, spec.shape) for spec in specs}
        metadata = FORMAT | {"lane": "all" if lane is None else str(lane)}
        file = stack.enter_context(closing(ShardFile(directory / name, contents, metadata)))
        return cls(file, lane, stack.enter_context(ThreadPoolExecutor(1, "write-shard")))

    def submit(self, specs: Sequence[WeightSpec], tensor: Tensor) -> Future[Mark]:
        """Write this file's parts of a source tensor; gives how far the file then is."""
        return self.thread.submit(self._write, [spec for spec in specs if spec.shared == (self.lane is None)], tensor)

    def _write(self, specs: Sequence[WeightSpec], tensor: Tensor) -> Mark:
        for spec in specs:
            self.file.append(spec.name, spec.take(tensor, self.lane or 0).to(spec.torch_dtype))
        return self.file.mark


def _resume(files: Sequence[ShardFile], sources: Sequence[str], journal: ShardJournal) -> int:
    """Keep what an earlier writer finished; returns how many source tensors that are."""
    noted = journal.marks(len(files))[: len(sources)]
    with ThreadPoolExecutor(len(files), "hash-shard") as pool:
        matching = pool.map(ShardFile.matching, files, [[marks[at] for marks in noted] for at in range(len(files))])
        kept = min(matching)
    journal.restart(sources, noted[:kept])
    for file in files:
        file.cut(kept)
    return kept


def _read_ahead(
    read: Callable[[str], Tensor], by_source: Mapping[str, Sequence[WeightSpec]]
) -> Iterator[tuple[str, Tensor]]:
    """Source tensors in order; the next one is read while the caller works, unless it is large."""
    sources = list(by_source)
    with ThreadPoolExecutor(1, "read-source") as pool:
        pending = pool.submit(read, sources[0]) if sources else None
        for source, following in zip(sources, [*sources[1:], ""]):
            tensor = pending.result() if pending is not None else read(source)
            small = following and _source_bytes(by_source[following][0]) <= READ_AHEAD_BYTES
            pending = pool.submit(read, following) if small else None
            yield source, tensor
            del tensor


def _source_bytes(spec: WeightSpec) -> int:
    """Size of a source tensor, should it have the weight's element type."""
    return math.prod(spec.source_shape) * spec.torch_dtype.itemsize


def _check_shape(spec: WeightSpec, tensor: Tensor) -> None:
    if tuple(tensor.shape) != spec.source_shape:
        raise InputFileError(
            f"weight '{spec.source}' has shape {list(tensor.shape)}, the program needs {list(spec.source_shape)}"
        )
