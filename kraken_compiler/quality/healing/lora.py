"""Low-rank updates instead of whole weights, by peft."""

from __future__ import annotations

from typing import Any

import torch

from kraken_compiler.errors import UsageError
from kraken_compiler.training.parameters import LaneParameters, TrainedWeight


def add_lora(parameters: LaneParameters, rank: int, seed: int) -> None:
    """Train updates of a low rank to the lanes' matrices, and nothing else.

    Stacked weights [lanes, out, in] get one update a lane.

    Args:
        parameters: They are changed.
        rank: Of each update.
        seed: Of the updates' first values; the product of the two factors begins at zero.

    Raises:
        UsageError: peft is not installed, or no weight is the lanes' own.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            f"--lora needs packages that are not installed: pip install 'kraken-compiler[heal]' ({error})"
        ) from error
    targets = [f"{name}.weight" for name in parameters.trainable if _is_matrix(parameters, name)]
    if not targets:
        raise UsageError("--lora: the program has no matrix that is split between lanes")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, parameters.trainable)
    for name, parameter in parameters.trainable.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(parameters: LaneParameters) -> None:
    """Add the updates to the weights and drop them."""
    for name, module in list(parameters.trainable.items()):
        if not isinstance(module, TrainedWeight):
            wrapper: Any = module
            wrapper.merge()
            parameters.trainable[name] = wrapper.get_base_layer()


def _is_matrix(parameters: LaneParameters, name: str) -> bool:
    spec = parameters.table[name]
    return bool(spec.shards) and len(spec.shape) == 2
