"""All lanes of an artifact of this backend: as a program, and as a module of one process."""

from __future__ import annotations

import torch

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.lane_graph.graph_file import load_graph
from kraken_compiler.backends.lane_graph.lane_files import GRAPH_FILE, load_lane_weights
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.lanes.module import LaneModule


def load_lanes(artifact: Artifact) -> LaneModule:
    """All lanes of an artifact in one process; the lanes' weights are exactly those in the files.

    Raises:
        InputFileError: A file is missing or damaged.
    """
    program = load_program(artifact)
    lanes = [load_lane_weights(artifact, lane, program.weights) for lane in range(program.degree)]
    module = LaneModule(program)
    for name, spec in program.weights.items():
        parts = [weights.pop(name) for weights in lanes]
        # The parts are pages of the files; a trainable module owns its memory.
        module._set_weight(spec, torch.stack(parts) if spec.shards else parts[0].clone())
    return module


def load_program(artifact: Artifact) -> LaneProgram:
    """The lane program of an artifact: graph and records, no weights. Its nodes carry no `meta["val"]`.

    Raises:
        InputFileError: The graph is missing or damaged.
    """
    manifest = artifact.manifest
    return LaneProgram(
        module=load_graph(artifact.path(GRAPH_FILE)),
        weights=manifest.weight_table,
        inputs=manifest.inputs,
        call=manifest.call,
        degree=manifest.degree,
        layers=manifest.layers,
        plan=manifest.plan,
        windows=manifest.windows,
    )
