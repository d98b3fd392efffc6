"""Write every lane's part of the weights, reading each source tensor once and holding one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.progress import Advance
from kraken_compiler.weights.streaming_writer import StreamingSafetensorsWriter

FORMAT = {"format": "pt", "kraken_weights": "1"}


def shard_file(lane: int) -> str:
    """Name of the file with a lane's part of the weights."""
    return f"lane-{lane}.safetensors"


def write_lane_shards(
    program: Program, read: Callable[[str], Tensor], directory: Path, progress: Advance | None = None
) -> list[Path]:
    """Write `lane-0.safetensors` ... `lane-(N-1).safetensors`, keyed by placeholder name.

    Memory stays around the largest single tensor, whatever the size of a shard.

    Args:
        program: A lane program; its weight table says what each lane owns.
        read: Gives a whole source tensor (`program.constants` are read from the program itself).
        directory: An existing directory.
        progress: Told about every source tensor that is done.

    Returns:
        The files, lane 0 first.

    Raises:
        InputFileError: A source tensor cannot be read or a file cannot be written.
    """
    contents = {name: (spec.torch_dtype, spec.shape) for name, spec in program.weights.items()}
    paths = [directory / shard_file(lane) for lane in range(program.degree)]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(StreamingSafetensorsWriter(path, contents, FORMAT | {"lane": str(lane)}))
            for lane, path in enumerate(paths)
        ]
        for spec, lane, local in lane_parts(program, program.weights.values(), read, progress):
            writers[lane].write(spec.name, local)
    return paths


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
    by_source: dict[str, list[WeightSpec]] = defaultdict(list)
    for spec in specs:
        by_source[spec.source].append(spec)
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


def _check_shape(spec: WeightSpec, tensor: Tensor) -> None:
    if tuple(tensor.shape) != spec.source_shape:
        raise InputFileError(
            f"weight '{spec.source}' has shape {list(tensor.shape)}, the program needs {list(spec.source_shape)}"
        )
