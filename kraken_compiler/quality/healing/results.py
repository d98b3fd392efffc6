"""The trained weights as files, one per lane, from which the new artifact is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.quality.healing.lora import merge_lora
from kraken_compiler.quality.healing.trainer import Trainer
from kraken_compiler.weights.shards import shard_file
from kraken_compiler.weights.streaming_writer import StreamingSafetensorsWriter


def write_results(trainer: Trainer, folder: Path, degree: int) -> None:
    """Write this process's lanes: only weights that were trained, in the program's element types.

    Low-rank updates are merged; the trainer cannot go on after this.

    Raises:
        InputFileError: A file cannot be written.
    """
    merge_lora(trainer.parameters)
    peers = trainer.peers
    lanes = range(degree) if peers.count == 1 else (peers.rank,)
    contents = {spec.name: (spec.torch_dtype, spec.shape) for spec, _ in trainer.parameters.results()}
    with ExitStack() as stack:
        writers = {
            lane: stack.enter_context(StreamingSafetensorsWriter(folder / shard_file(lane), contents)) for lane in lanes
        }
        for spec, value in trainer.parameters.results():
            for lane, part in _parts(spec, value, tuple(lanes)):
                writers[lane].write(spec.name, part)


def _parts(spec: WeightSpec, value: Tensor, lanes: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    stacked = bool(spec.shards) and len(lanes) > 1
    return ((lane, value[lane] if stacked else value) for lane in lanes)
