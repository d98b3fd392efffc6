"""`load`: an artifact as a module, one rank's inside a process group, all lanes' outside."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.single.lane_module import LaneModule
from kraken_compiler.backends.torch_dist.graph_file import load_graph
from kraken_compiler.backends.torch_dist.lane_files import GRAPH_FILE, load_lane_weights
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import LaneProgram


def load(directory: Path | str, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Load an artifact.

    Args:
        directory: An artifact that `kraken-compile` wrote.
        group: The ranks that run the lanes, when there is an initialised process group; None means all.

    Returns:
        Inside an initialised `torch.distributed` group this rank's `RankProgram`, else a `LaneModule` with all lanes.
        Both have the source model's call signature and output structure.

    Raises:
        InputFileError: No artifact, or a file of it is missing, truncated or tampered with.
        UsageError: The group's size is not the artifact's degree.
    """
    if dist.is_available() and dist.is_initialized():
        return RankProgram.load(_torch_artifact(directory, verify=False), group=group)
    return load_lanes(_torch_artifact(directory, verify=True))


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


def _torch_artifact(directory: Path | str, verify: bool) -> Artifact:
    artifact = open_artifact(directory, verify=verify)
    if "torch" not in artifact.manifest.backends:
        raise InputFileError(
            f"{directory}: was compiled without the torch backend (it has: {', '.join(artifact.manifest.backends)})"
        )
    return artifact
