"""Write every lane's part of the weights, reading each source tensor once and holding two at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.progress import Advance
from kraken_compiler.weights.lane_file import LaneFile
from kraken_compiler.weights.shard_journal import ShardJournal

FORMAT = {"format": "pt", "kraken_weights": "1"}
READ_AHEAD_BYTES = 256 << 20
"""A source tensor up to this size is read while the one before it is written."""


def shard_file(lane: int) -> str:
    """Name of the file with a lane's part of the weights."""
    return f"lane-{lane}.safetensors"


def write_lane_shards(
    program: Program, read: Callable[[str], Tensor], directory: Path, progress: Advance | None = None
) -> list[Path]:
    """Write `lane-0.safetensors` ... `lane-(N-1).safetensors`, keyed by placeholder name, and their journal.

    Memory stays around the largest two tensors, whatever the size of a shard; around the largest alone if that is
    larger than `READ_AHEAD_BYTES`. What an earlier call wrote into the directory is kept as far as its journal and the
    hashes say that it is whole: the caller must know that it was of the same values.

    Args:
        program: A lane program; its weight table says what each lane owns.
        read: Gives a whole source tensor (`program.constants` are read from the program itself). Called in one other
            thread, one call after the other.
        directory: An existing directory.
        progress: Told about every source tensor that is done.

    Returns:
        The files, lane 0 first.

    Raises:
        InputFileError: A source tensor cannot be read, or is not of the shape that the program needs.
        OSError: A file cannot be written; names it.
    """
    by_source = _by_source(program.weights.values())
    sources = list(by_source)
    contents = {spec.name: (spec.torch_dtype, spec.shape) for specs in by_source.values() for spec in specs}
    lanes = range(program.degree)
    with ExitStack() as stack:
        files = [
            stack.enter_context(closing(LaneFile(directory / shard_file(lane), contents, FORMAT | {"lane": str(lane)})))
            for lane in lanes
        ]
        journal = ShardJournal(directory)
        pool = stack.enter_context(ThreadPoolExecutor(program.degree, "write-lane"))
        kept = _resume(files, sources, journal, pool)
        tensors = _read_ahead(program.reader(read), {source: by_source[source] for source in sources[kept:]})
        for done, (source, tensor) in enumerate(tensors, start=kept + 1):
            specs = by_source[source]
            for spec in specs:
                _check_shape(spec, tensor)
            list(pool.map(_write_parts, files, lanes, [specs] * len(files), [tensor] * len(files)))
            del tensor
            journal.add(source, [file.mark for file in files])
            if progress is not None:
                progress(done, len(sources), source)
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


def _resume(files: Sequence[LaneFile], sources: Sequence[str], journal: ShardJournal, pool: ThreadPoolExecutor) -> int:
    """Keep what an earlier writer finished; returns how many source tensors that are."""
    noted = journal.marks(len(files))[: len(sources)]
    matching = pool.map(LaneFile.matching, files, [[marks[lane] for marks in noted] for lane in range(len(files))])
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


def _write_parts(file: LaneFile, lane: int, specs: Sequence[WeightSpec], tensor: Tensor) -> None:
    for spec in specs:
        file.append(spec.name, spec.take(tensor, lane).to(spec.torch_dtype))


def _check_shape(spec: WeightSpec, tensor: Tensor) -> None:
    if tuple(tensor.shape) != spec.source_shape:
        raise InputFileError(
            f"weight '{spec.source}' has shape {list(tensor.shape)}, the program needs {list(spec.source_shape)}"
        )
