"""The torch backend's files inside an artifact: what they are called, and one lane's weights as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.weights.shards import shard_file

GRAPH_FILE, STEP_FILE, TABLES_FILE = "torch/lane.pt2", "torch/step.pt2", "torch/tables.pt2"
"""The lane graph, and what a KV cache adds to it: prefill and decode, and what is computed once for a capacity."""


def lane_file(lane: int) -> str:
    """Path of a lane's weights inside an artifact."""
    return f"torch/{shard_file(lane)}"


def load_lane_weights(path: Path, table: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """Map one lane's weights into memory; their pages are read when they are used.

    Raises:
        InputFileError: The file is missing or damaged, or lacks a weight of the table.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            missing = [name for name in table if name not in held]
            if missing:
                raise InputFileError(f"{path}: lacks {len(missing)} weights, the first is '{missing[0]}'")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in table}
    except (OSError, SafetensorError, ValueError, AttributeError, RuntimeError) as error:
        raise InputFileError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    for name, spec in table.items():
        found = tensors[name]
        if tuple(found.shape) != spec.shape or found.dtype != spec.torch_dtype:
            raise InputFileError(
                f"{path}: weight '{name}' is {found.dtype} {list(found.shape)}, the manifest says "
                f"{spec.dtype} {list(spec.shape)}"
            )
    return tensors
