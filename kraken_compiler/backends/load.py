"""`load`: an artifact as a module, one rank's inside a process group, all lanes' outside."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import nn

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.torch_dist.lanes import load_lanes
from kraken_compiler.backends.torch_dist.run.rank_program import RankProgram
from kraken_compiler.errors import InputFileError


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


def _torch_artifact(directory: Path | str, verify: bool) -> Artifact:
    artifact = open_artifact(directory, verify=verify)
    if TorchBackend.name not in artifact.manifest.backends:
        raise InputFileError(
            f"{directory}: was compiled without the torch backend (it has: {', '.join(artifact.manifest.backends)})"
        )
    return artifact
