"""Ranks of tests with torch: their process group, and their programs of an artifact."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from kraken_compiler.backends.open_model import open_model
from kraken_compiler.backends.registry import backend_named
from kraken_compiler.backends.torch_dist.run.model import TorchModel
from kraken_compiler.ranks.communicators.join import process_group, rank_device
from kraken_compiler.ranks.session import Ranks


def device_of(ranks: Ranks) -> torch.device:
    """Where a rank computes: on a GPU if every rank can have one."""
    return rank_device(None, ranks.place)


def group_of(ranks: Ranks) -> dist.ProcessGroup:
    """The process group of all ranks, made at the first call."""
    return process_group(ranks, device_of(ranks))


def model_of(directory: Path | str, ranks: Ranks) -> TorchModel:
    """This rank's torch program of an artifact."""
    _, model = open_model(directory, ranks, lambda artifact: backend_named("torch"))
    assert isinstance(model, TorchModel)
    return model
