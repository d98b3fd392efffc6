"""The files of lanes inside an artifact: their names, and the weights as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.lanes.reference import ReadLane, read_from_lane_files
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY, SHARED_FILE, lane_file_name

GRAPH_FILE, ROWS_FILE, STEP_FILE, SPLIT_FILE, TABLES_FILE = (
    f"{LANES_DIRECTORY}/{name}.json" for name in ("lane", "split_rows", "step", "split_step", "tables")
)
"""The lane graph, and that on two halves of rows. What a KV cache adds: prefill and decode, that on two halves
of the tokens, and what is computed once for a capacity."""

SHARED_WEIGHTS = f"{LANES_DIRECTORY}/{SHARED_FILE}"
"""The weights that all lanes hold whole."""


def lane_file(lane: int) -> str:
    """Path of the weights that are a lane's own, inside an artifact."""
    return f"{LANES_DIRECTORY}/{lane_file_name(lane)}"


def rank_files(artifact: Artifact, lane: int) -> tuple[str, ...]:
    """Paths inside an artifact of the files that the rank of a lane reads."""
    others = [name for name in (ROWS_FILE, STEP_FILE, SPLIT_FILE, TABLES_FILE) if name in artifact.manifest.files]
    return GRAPH_FILE, *others, lane_file(lane), SHARED_WEIGHTS


def load_lane_weights(artifact: Artifact, lane: int, table: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """Map one lane's weights into memory; their pages are read when they are used.

    Processes of one host that map the shared weights have one copy of them.

    Raises:
        InputFileError: A file is missing or damaged, or lacks a weight of the table.
    """
    own_specs = {name: spec for name, spec in table.items() if not spec.shared}
    shared_specs = {name: spec for name, spec in table.items() if spec.shared}
    tensors = map_weights(artifact.path(lane_file(lane)), own_specs)
    tensors |= map_weights(artifact.path(SHARED_WEIGHTS), shared_specs)
    return {name: tensors[name] for name in table}


def map_weights(path: Path, table: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """Map the weights of a file into memory.

    Raises:
        InputFileError: The file is missing or damaged, or lacks a weight of the table.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            missing_names = [name for name in table if name not in keys]
            if missing_names:
                raise InputFileError(f"{path}: lacks {len(missing_names)} weights, the first is '{missing_names[0]}'")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in table}
    except (OSError, SafetensorError, ValueError, AttributeError, RuntimeError) as error:
        raise InputFileError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    for name, spec in table.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
            raise InputFileError(
                f"{path}: weight '{name}' is {tensor.dtype} {list(tensor.shape)}, the manifest says "
                f"{spec.dtype} {list(spec.shape)}"
            )
    return tensors


def read_weights(artifact: Artifact, degree: int) -> ReadLane:
    """Local tensors of all lanes, copied out of the artifact's files."""
    lanes = [artifact.path(lane_file(lane)) for lane in range(degree)]
    return read_from_lane_files(lanes, artifact.path(SHARED_WEIGHTS))
