"""Tensors that a model's files leave out because its code makes them: sinusoidal positions, a bias of zeros."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler.weights.checkpoint_store import TensorSource


def made_by_code(model: nn.Module, missing: Iterable[str]) -> dict[str, TensorSource]:
    """Values of those missing tensors that transformers leaves out when it saves the model, or misses without a word.

    A value counts only if the code makes the same one twice, whatever the random numbers are.

    Args:
        model: A `transformers.PreTrainedModel`, its parameters on the meta device.
        missing: Names of tensors that the files lack.

    Returns:
        Name -> what it is made from; the others are left out.
    """
    declared: Any = model
    patterns = [*(declared._keys_to_ignore_on_load_missing or ()), *(declared._keys_to_ignore_on_save or ())]
    by_owner: dict[str, list[str]] = {}
    for name in missing:
        if any(re.search(pattern, name) for pattern in patterns):
            by_owner.setdefault(name.rpartition(".")[0], []).append(name)
    sources: dict[str, TensorSource] = {}
    for owner, names in by_owner.items():
        first, second = (_initial_values(model, owner, seed) for seed in (0, 1))
        for name in names:
            attribute = name.rpartition(".")[2]
            if attribute in first and torch.equal(first[attribute], second[attribute]):
                sources[name] = TensorSource((), _constant(first[attribute]))
    return sources


def _constant(value: Tensor) -> Any:
    return lambda read: value


def _initial_values(model: nn.Module, owner: str, seed: int) -> dict[str, Tensor]:
    """The own tensors of a module as the model's code fills them from other numbers for every seed."""
    module = model.get_submodule(owner)
    # Not the modules within: they may be large, and what is missing of them has them as its owner.
    twin = copy.copy(module)
    twin._modules, twin._buffers = {}, dict(module._buffers)
    twin._parameters = {
        name: None if value is None else nn.Parameter(torch.full(value.shape, float(seed), dtype=value.dtype))
        for name, value in module._parameters.items()
    }
    for name, value in twin._buffers.items():
        if value is not None and value.is_floating_point():
            twin._buffers[name] = torch.full(value.shape, float(seed), dtype=value.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model._init_weights(twin)  # type: ignore[operator]
    state = {**twin._parameters, **twin._buffers}
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
