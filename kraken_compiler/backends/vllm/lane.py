"""A lane of an artifact as an engine runs it: its graphs and weights, whoever computes its attentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, fx

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.lane_graph.graph_file import load_graph
from kraken_compiler.backends.lane_graph.lane_files import load_lane_weights
from kraken_compiler.backends.lane_graph.run_graph import run_tables
from kraken_compiler.backends.vllm.format import (
    BODY_FILE,
    HEAD_FILE,
    PREPARE_FILE,
    RECORD_FILE,
    TABLE,
    EngineRecord,
    read_record,
)
from kraken_compiler.errors import InputFileError
from kraken_compiler.ops.engine_attention import ENGINE_ATTENTION


@dataclass(frozen=True)
class EngineLane:
    """One lane. Placeholders of its graphs: the weights that they read, then their inputs (see `FlatProgram`).

    Attributes:
        record: What the attentions are, and the sizes.
        body, head, prepare: The graphs.
        weights: The lane's weights by placeholder, mapped out of the files.
    """

    record: EngineRecord
    body: fx.GraphModule
    head: fx.GraphModule
    prepare: fx.GraphModule
    weights: Mapping[str, Tensor]

    @classmethod
    def load(cls, artifact: Artifact, lane: int) -> Self:
        """Read a lane's graphs, and map its weights.

        Raises:
            InputFileError: A file is missing or damaged, or the files do not belong together.
        """
        record = read_record(artifact.path(RECORD_FILE))
        body, head, prepare = (load_graph(artifact.path(name)) for name in (BODY_FILE, HEAD_FILE, PREPARE_FILE))
        numbers = [node.args[3] for node in body.graph.find_nodes(op="call_function", target=ENGINE_ATTENTION)]
        if numbers != list(range(len(record.attentions))):
            raise InputFileError(f"{artifact.directory}: its engine files do not belong together")
        return cls(record, body, head, prepare, load_lane_weights(artifact, lane, artifact.manifest.weight_table))

    def prepared(self, capacity: int, weights: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, ...]:
        """What is computed once at load: the tables for sequences up to a length, then slopes and sinks.

        Args:
            capacity: The length.
            weights: By placeholder, on the device; those that the graph reads are enough.
            device: Where to compute.

        Raises:
            UsageError: The model's positions do not reach that far.
        """
        *names, _ = (node.name for node in self.prepare.graph.find_nodes(op="placeholder"))
        return run_tables(self.prepare, [weights[name] for name in names], capacity, device)

    def tables(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tables among what `prepared` gave, by the names of the graphs' inputs."""
        return {f"{TABLE}{number}": table for number, table in enumerate(prepared[: self.record.tables])}
