"""A rank that interprets the lane graph. Knows numpy, and no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Array, RankModel
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY, SHARED_FILE, lane_file_name
from tests.numpy_backend.graph import LaneGraph
from tests.numpy_backend.operators import OPERATORS


class NumpyModel(RankModel):
    """See `RankModel`. It keeps no KV cache: generation recomputes."""

    vocabulary, positions = None, sys.maxsize

    def __init__(self, artifact: Artifact, ranks: Ranks, graph: LaneGraph, dtype: str) -> None:
        files = (f"{LANES_DIRECTORY}/{lane_file_name(ranks.rank)}", f"{LANES_DIRECTORY}/{SHARED_FILE}")
        weights = {name: value for file in files for name, value in load_file(artifact.path(file)).items()}
        # Numbers of rows stay whole numbers.
        self._weights = {
            name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in weights.items()
        }
        self._graph, self._names = graph, [spec.name for spec in artifact.manifest.inputs]
        self._operators = OPERATORS | {
            "kraken::all_reduce_start": lambda x: ranks.start(x),
            "kraken::wait": lambda handle: ranks.wait(handle),
            "kraken::all_gather": lambda x, dim, degree: ranks.all_gather(x, dim),
        }

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """See `RankModel.run`."""
        values: dict[str, Any] = self._weights | {name: inputs[name] for name in self._names}
        for node in self._graph.nodes:
            values[node.name] = self._operators[node.op](*(_operand(argument, values) for argument in node.args))
        return [np.asarray(values[name]) for name in self._graph.outputs]


def _operand(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, dict):
        return values[argument["node"]]
    return [_operand(one, values) for one in argument] if isinstance(argument, list) else argument
