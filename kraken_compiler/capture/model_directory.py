"""The reading of a model directory: the one place that decides on it, as transformers' `from_pretrained` does.

The model is that of `config.json`; its weights are those of the files that transformers would take; an adapter beside
them is applied. A directory that holds only an adapter names the directory of its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.checkpoint_map import map_checkpoint
from kraken_compiler.capture.huggingface_model import named_state
from kraken_compiler.capture.made_by_code import made_by_code
from kraken_compiler.capture.tied_tensors import settle_ties
from kraken_compiler.capture.unused_tensors import float8_note, settle_unused
from kraken_compiler.errors import InputFileError
from kraken_compiler.weights.checkpoint import Checkpoint, PickledCheckpoint, Rows, SafetensorsCheckpoint, same_values
from kraken_compiler.weights.checkpoint_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    PICKLED_ADAPTER,
    WeightFiles,
    first_names,
    placements,
    unread_weights,
)
from kraken_compiler.weights.checkpoint_store import CheckpointStore, ExpectedTensor, TensorSource


@dataclass(frozen=True)
class ModelDirectory:
    """The parts of a model directory.

    Attributes:
        path: What the user named.
        base: Where `config.json` and the weights are.
        adapter: The adapter's config and weights; none if there is no adapter.
    """

    path: Path
    base: Path
    adapter: tuple[Path, ...] = ()

    @classmethod
    def at(cls, path: Path, *, trust_pickle: bool) -> ModelDirectory:
        """The parts of the directory `path`.

        Raises:
            InputFileError: Its adapter has no weights, only pickled ones that are not trusted, or a model that is not a
                directory here.
        """
        config = path / ADAPTER_CONFIG
        if not config.is_file():
            return cls(path, path)
        base = path if (path / "config.json").is_file() else _base_of(config)
        if (path / ADAPTER).is_file():
            return cls(path, base, (config, path / ADAPTER))
        pickled = path / PICKLED_ADAPTER
        if not pickled.is_file():
            raise InputFileError(f"{path} holds an {ADAPTER_CONFIG} and no {ADAPTER}: remove it, or add the weights")
        if not trust_pickle:
            raise InputFileError(
                f"{pickled} is a pickle, which can run any code when it is opened: save the adapter again with "
                "safe_serialization=True, or pass --trust-pickle"
            )
        return cls(path, base, (config, pickled))


@dataclass(frozen=True)
class Reading:
    """The sources of a model's tensors, with notes.

    Attributes:
        sources: Tensor name -> what it is made from.
        notes: What a user should know, one sentence each.
        unused: Tensors of the files that nothing is made from.
    """

    sources: Mapping[str, TensorSource]
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def open_checkpoint(directory: Path, files: WeightFiles | None, *, trust_pickle: bool) -> Checkpoint | None:
    """The checkpoint, None if there is none or it is pickled and not trusted."""
    if files is None or (files.pickled and not trust_pickle):
        return None
    return (PickledCheckpoint if files.pickled else SafetensorsCheckpoint).open(files.files)


def read_as(model: nn.Module, checkpoint: Checkpoint, files: WeightFiles, directory: Path) -> Reading:
    """Say what every tensor of `model` is read from; tensors that its config ties are untied in it where files differ.

    Raises:
        InputFileError: A tensor is in the files more than once and differs, or one that is not read belongs to one that
            is.
    """
    checkpoint_map = map_checkpoint(model, checkpoint)
    expected = expected_tensors(model, checkpoint_map.sources)
    store = CheckpointStore(checkpoint, checkpoint_map.sources, expected, directory)

    def rows(name: str) -> Rows:
        by_rows = store.read.rows_of(name) if expected[name].shape else None
        if by_rows is None:
            tensor = store.read(name)
            return Rows(
                tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop] if tensor.dim() else tensor
            )
        return Rows(expected[name].dtype, by_rows.shape, by_rows.read)

    ties = settle_ties(
        model, set(checkpoint_map.sources), lambda one, other: same_values(rows(one), rows(other)), directory
    )
    sources = {name: checkpoint_map.sources[holder] for name, holder in ties.stored_names.items()}
    sources |= made_by_code(model, [name for name in model.state_dict() if name not in sources])
    used = {key for source in sources.values() for key in source.keys}
    notes = (
        *files.notes(directory),
        *_misplaced(directory, files, checkpoint),
        *ties.notes(),
        *settle_unused(model, checkpoint, checkpoint_map.unused, used),
        *float8_note(checkpoint, used, files.beside(directory)),
    )
    return Reading(sources, notes, checkpoint_map.unused)


def expected_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, ExpectedTensor]:
    """Element types and shapes of some of the model's tensors."""
    state = named_state(model)
    return {name: ExpectedTensor(state[name].dtype, tuple(state[name].shape)) for name in names if name in state}


def require_complete(model: nn.Module, names: Iterable[str], reading: Reading, checkpoint: Checkpoint) -> None:
    """Check that the files hold every one of these tensors; transformers would give random numbers to one they lack.

    Raises:
        InputFileError: They lack one.
    """
    missing = [name for name in names if name not in reading.sources]
    if not missing:
        return
    files = checkpoint.files
    place = str(files[0]) if len(files) == 1 else f"the {len(files)} weight files of {files[0].parent}"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise InputFileError(
        f"tensor '{missing[0]}'{more} of the model is missing from {place}{_why_missing(model, missing[0], reading)}"
    )


def without_weights(directory: Path, files: WeightFiles | None) -> InputFileError:
    """The error about a directory whose weights cannot be read, `files` being its pickles."""
    if files is not None:
        return InputFileError(
            f"{directory} has its weights only as {files.files[0].name}, a pickle, which can run any code when it is "
            "opened: save the model again with save_pretrained(..., safe_serialization=True), or pass --trust-pickle"
        )
    others = unread_weights(directory)
    if others:
        return InputFileError(
            f"{directory} has no weight files that transformers reads (model.safetensors, or its index), only "
            f"{first_names(others)}: rename it, or save the model again"
        )
    return InputFileError(f"{directory} has no weight files (*.safetensors), only a config")


def own_dtype(config: Any, checkpoint: Checkpoint | None) -> torch.dtype:
    """The config's element type, else that of the first file's first floating-point tensor, as transformers does."""
    config_dtype = getattr(config, "dtype", None)
    dtype = getattr(torch, config_dtype, None) if isinstance(config_dtype, str) else config_dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    if checkpoint is None:
        return torch.float32
    keys = [key for key in sorted(checkpoint.names()) if checkpoint.file_of(key) == checkpoint.files[0]]
    dtypes = (checkpoint.describe(key)[0] for key in keys)
    return next(
        (one for one in dtypes if one is not None and one.is_floating_point and one.itemsize > 1), torch.float32
    )


def _base_of(config: Path) -> Path:
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        base_name = fields["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputFileError(
            f"{config.parent} holds an adapter, not a model, and {config.name} names no base model: merge the adapter "
            "into its model and save that"
        ) from error
    base = Path(str(base_name))
    if not (base / "config.json").is_file():
        raise InputFileError(
            f"{config.parent} holds an adapter, not a model, and its base model '{base_name}' is no model directory "
            "here: put the adapter's two files beside the model, or merge it and save that"
        )
    return base


def _misplaced(directory: Path, files: WeightFiles, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note about tensors that are in other files than the index says; they are read from where they are."""
    if files.index is None:
        return ()
    index_files = placements(files.index)
    names = set(checkpoint.names())
    misplaced = [
        key for key, name in index_files.items() if key in names and checkpoint.file_of(key) != directory / name
    ]
    if not misplaced:
        return ()
    return (
        f"{files.index.name} names other files than those that hold {len(misplaced)} tensors "
        f"({first_names(misplaced)})",
    )


def _why_missing(model: Any, name: str, reading: Reading) -> str:
    module = name.rpartition(".")[0]
    similar = [key for key in reading.unused if (key.startswith(f"{module}.") and module) or key.endswith(f".{name}")]
    if similar:
        return f"; instead they hold {first_names(similar)}"
    tied_keys = model._tied_weights_keys
    if isinstance(tied_keys, dict) and name in tied_keys:
        return f", and the config does not tie it to '{tied_keys[name]}' (tie_word_embeddings)"
    return ""
