"""The trained weights as files, every lane's own and shared ones, from which the new model is written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from kraken_compiler.training.trainer import Trainer
from kraken_compiler.weights.io.safetensors_writer import SafetensorsWriter, new_safetensors
from kraken_compiler.weights.lane_file_names import SHARED_FILE, lane_file_name


def write_results(trainer: Trainer, folder: Path, degree: int) -> None:
    """Write this process's lanes: only weights that were trained, in the program's element types.

    Raises:
        InputFileError: A file cannot be written.
    """
    peers = trainer.peers
    if peers.rank >= peers.parts:
        return  # another process has the same weights
    lanes = range(degree) if peers.parts == 1 else (peers.rank,)
    specs = [spec for spec, _ in trainer.parameters.results()]
    with ExitStack() as stack:

        def writer(name: str, shared: bool) -> SafetensorsWriter:
            contents = {spec.name: (spec.torch_dtype, spec.shape) for spec in specs if spec.shared == shared}
            return stack.enter_context(new_safetensors(folder / name, contents))

        own = {lane: writer(lane_file_name(lane), shared=False) for lane in lanes}
        # All ranks train what all lanes hold in the same way.
        common = writer(SHARED_FILE, shared=True) if peers.rank == 0 else None
        for spec, value in trainer.parameters.results():
            if not spec.shared:
                for at, lane in enumerate(lanes):
                    own[lane].append(spec.name, value[at] if value.ndim > len(spec.shape) else value)
            elif common is not None:
                common.append(spec.name, value)
