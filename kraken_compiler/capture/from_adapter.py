"""Merge an adapter into a model's weights, in memory: transformers loads it, peft merges it."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.filled_model import fill
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.errors import InputFileError, Rejection, UnsupportedModelError, first_line, missing_packages
from kraken_compiler.weights.checkpoint_files import ADAPTER, PICKLED_ADAPTER, first_names
from kraken_compiler.weights.store import WeightStore


def with_adapter(model: nn.Module, store: WeightStore, adapter: Path) -> nn.Module:
    """`model` with its values, all in memory, and the adapter's updates added to them.

    Args:
        model: A `transformers.PreTrainedModel` with parameters on the meta device; it is changed.
        store: Its values.
        adapter: The directory of the adapter.

    Raises:
        InputFileError: The adapter is damaged, or does not fit the model.
        UsageError: peft is not installed.
        UnsupportedModelError: The adapter is of a kind that is no update of weights.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise missing_packages(f"reading the adapter in {adapter}", error, "heal") from error
    fill(model, store)
    _load(model, adapter)
    _merge(model, adapter)
    return model


def _load(model: Any, adapter: Path) -> None:
    from peft import PeftConfig
    from safetensors import SafetensorError

    pickled = adapter / PICKLED_ADAPTER
    try:
        with quiet_transformers():
            if (adapter / ADAPTER).is_file():
                loading_info = model.load_adapter(str(adapter), adapter_kwargs={"local_files_only": True})
            else:
                state = torch.load(pickled, map_location="cpu", weights_only=True)
                config = PeftConfig.from_pretrained(str(adapter))
                loading_info = model.load_adapter(peft_config=config, adapter_state_dict=state)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise InputFileError(f"{adapter}: its adapter cannot be applied to the model: {first_line(error)}") from error
    # Older releases of transformers raise for keys that they do not expect, and return nothing.
    for problem, keys in (
        ("does not find {} tensors of the adapter in its file", getattr(loading_info, "missing_keys", ())),
        ("finds no place for {} tensors of the adapter's file", getattr(loading_info, "unexpected_keys", ())),
        (
            "finds {} tensors of the adapter in another shape",
            [k for k, *_ in getattr(loading_info, "mismatched_keys", ())],
        ),
    ):
        if keys:
            raise InputFileError(
                f"{adapter}: transformers {problem.format(len(keys))} ({first_names(sorted(keys))}): merge it with "
                "peft (merge_and_unload) and save the model"
            )


def _merge(model: nn.Module, adapter: Path) -> None:
    """Replace every module that the adapter put in by the module that it stands for, its update added."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model.eval()
    adapter_modules = {
        path: one for path, one in model.named_modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    for path, module in adapter_modules.items():
        if any(path.startswith(f"{outer}.") for outer in adapter_modules):
            continue  # the outer one merges what is in it
        try:
            if isinstance(module, BaseTunerLayer):
                _unshare_parameters(model, module.get_base_layer())
            if hasattr(module, "unload_and_optionally_merge_module"):
                replacement = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                module.merge(safe_merge=True)
                replacement = module.get_base_layer()
        except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
            raise UnsupportedModelError(
                [Rejection(f"the adapter in {adapter} cannot be merged: {first_line(error)}", path=path)]
            ) from error
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)


def _unshare_parameters(model: nn.Module, layer: nn.Module) -> None:
    """Give a layer copies of the parameters that it shares: an update of a tied head is none of the embedding."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if holders[id(parameter)] > 1:
            setattr(layer, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
