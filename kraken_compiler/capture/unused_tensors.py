"""Tensors of a checkpoint that no tensor of the model is made from: ignored, noted, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.checkpoint import Checkpoint
from kraken_compiler.weights.checkpoint_files import first_names
from kraken_compiler.weights.scaled_checkpoint import FLOAT8

_PEFT_PREFIX = "base_model.model."
"""Prefix that peft puts before the names of a model's tensors."""


def settle_unused(
    model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str], used: Iterable[str]
) -> tuple[str, ...]:
    """Notes about the tensors that nothing is made from.

    Those that transformers ignores for this model are passed over. One that stands in or under the module of a weight
    that is read (a scale, a zero point, a low-rank update, a bias) changes what that weight means.

    Args:
        model: A `transformers.PreTrainedModel`.
        checkpoint: Its weight files.
        unused: Their tensors that nothing is made from.
        used: Their other tensors.

    Raises:
        InputFileError: A tensor that is not read belongs to one that is.
    """
    pattern = _ignored_pattern(model)
    unexpected = [key for key in unused if pattern is None or not pattern.search(key)]
    used = set(used)
    weights = {key for key in used if key.endswith(".weight")}
    owners = {key: owner for key in unexpected if (owner := _owner(key, weights, used)) is not None}
    if owners:
        first, owner = next(iter(owners.items()))
        more = f" (and {len(owners) - 1} more such tensors)" if len(owners) > 1 else ""
        raise InputFileError(
            f"{checkpoint.file_of(first)}: tensor '{first}' belongs to '{owner}', and nothing of the model reads "
            f"it{more}: merge it into the weight, or remove it"
        )
    if not unexpected:
        return ()
    unscaled = _unscaled_float8(checkpoint, used)
    if unscaled:
        raise InputFileError(
            f"{checkpoint.file_of(unscaled[0])}: '{unscaled[0]}' is float8 without a scale that we know, and "
            f"{len(unexpected)} tensors of the files are not read ({first_names(unexpected)})"
        )
    subject = (
        "1 tensor of the files is not" if len(unexpected) == 1 else f"{len(unexpected)} tensors of the files are not"
    )
    return (f"{subject} part of the model and not read: {first_names(unexpected)}",)


def _unscaled_float8(checkpoint: Checkpoint, used: Iterable[str]) -> list[str]:
    """The tensors that are read as float8, with no scale."""
    return sorted(key for key in used if checkpoint.describe(key)[0] in FLOAT8)


def float8_note(checkpoint: Checkpoint, used: Iterable[str], unread_files: Sequence[str]) -> tuple[str, ...]:
    """A note about weights that are float8 and nothing else.

    Raises:
        InputFileError: Files that are not read, which may hold their scales, lie beside them.
    """
    unscaled = _unscaled_float8(checkpoint, used)
    if not unscaled:
        return ()
    if unread_files:
        raise InputFileError(
            f"{checkpoint.file_of(unscaled[0])}: '{unscaled[0]}' is float8 without a scale, "
            f"and {first_names(list(unread_files))} beside it, which may hold scales, is not read: name it in the "
            "index, or move it away"
        )
    return (f"{len(unscaled)} weights are float8 without scales: their numbers are taken as they are",)


def _ignored_pattern(model: Any) -> re.Pattern[str] | None:
    """Pattern of what transformers does not count as unexpected: what the class says, and buffers that moved."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _owner(key: str, weights: set[str], used: set[str]) -> str | None:
    """The tensor that is read and that `key` belongs to: the weight of a module around it, or one it is named after."""
    key = key.removeprefix(_PEFT_PREFIX)
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    for module in prefixes:
        if f"{module}.weight" in weights:
            return f"{module}.weight"
        if module in used:
            return module
    stem = key
    while "_" in stem.rpartition(".")[2]:
        stem = stem.rpartition("_")[0]
        if stem in used:
            return stem
    return None
