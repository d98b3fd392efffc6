"""Where training computes, and in what."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from kraken_compiler.training.settings import BFLOAT16, RunSettings

Settings = TypeVar("Settings", bound=RunSettings)


def training_device() -> torch.device:
    """Where a single process trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_precision(settings: Settings, processes: int) -> Settings:
    """The settings with the precision filled in, which depends on this machine.

    Args:
        settings: The run's.
        processes: How many train; they compute on GPUs where there is one for each.
    """
    if settings.precision is not None:
        return settings
    return replace(settings, precision=BFLOAT16 if torch.cuda.device_count() >= processes else "float32")
