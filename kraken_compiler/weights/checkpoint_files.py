"""The choice of a model directory's weight files: those that transformers reads, in its order of preference."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kraken_compiler.errors import InputFileError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SINGLE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG, ADAPTER, PICKLED_ADAPTER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "consolidated*.pth")
_SHARD = re.compile(r"-\d+-of-(\d+)\.")


@dataclass(frozen=True)
class WeightFiles:
    """The files of one checkpoint.

    Attributes:
        files: The files, sorted.
        index: Their index, if they are shards.
        pickled: They are pickles.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    pickled: bool = False

    def beside(self, directory: Path) -> list[str]:
        """Names of files that look like weights and are not read."""
        own_files = {*self.files, self.index}
        return [
            path.name
            for pattern in _WEIGHTS
            for path in sorted(directory.glob(pattern))
            if path not in own_files and path.name != ADAPTER
        ]

    def notes(self, directory: Path) -> tuple[str, ...]:
        """Notes about weight files that are not read, and about shards of several saves, one sentence each."""
        unread = self.beside(directory)
        primary = self.index or self.files[0]
        notes = []
        if unread:
            notes.append(f"not read: {first_names(unread)}; {primary.name} comes first, as in transformers")
        saves = {match[1] for path in self.files if (match := _SHARD.search(path.name))}
        if len(saves) > 1:
            counts = " and ".join(sorted(saves))
            notes.append(f"{primary.name} names shards of {len(saves)} saves (of {counts} files)")
        return tuple(notes)


def find_weight_files(directory: Path, transformers_weights: object = None) -> WeightFiles | None:
    """The files that hold a directory's weights, None if there are none under a name that transformers reads.

    A single file goes before an index, safetensors before pickles. Files that no such name or index leads to (variants,
    consolidated files, shards without an index) are not read.

    Args:
        directory: The model directory.
        transformers_weights: What its `config.json` says under that name: a file that goes before all others.

    Raises:
        InputFileError: An index is damaged or names a file that is not there.
    """
    if transformers_weights is not None:
        return _config_weight_files(directory, transformers_weights)
    for single, index, pickled in ((SINGLE, INDEX, False), (PICKLED_SINGLE, PICKLED_INDEX, True)):
        if (directory / single).is_file():
            return WeightFiles((directory / single,), pickled=pickled)
        if (directory / index).is_file():
            return WeightFiles(weight_files(directory, directory / index), directory / index, pickled)
    return None


def weight_files(directory: Path, index: Path) -> tuple[Path, ...]:
    """The files that an index names, sorted; their names count from the model directory.

    Raises:
        InputFileError: The index is damaged or names a file that is not there or not in the directory.
    """
    try:
        names = sorted(set(placements(index).values()))
        paths = tuple(directory / name for name in names)
    except TypeError as error:
        raise InputFileError(f"{index} is damaged: it does not map tensors to files") from error
    outside = [name for name, path in zip(names, paths) if not _is_inside(path, directory)]
    if outside:
        raise InputFileError(f"{index} names '{outside[0]}', which is outside of the directory")
    missing = [name for name, path in zip(names, paths) if not path.is_file()]
    if missing:
        raise InputFileError(
            f"{directory}: {len(missing)} of {len(paths)} weight files are missing ({first_names(missing)}), "
            f"{index.name} names them"
        )
    if not paths:
        raise InputFileError(f"{index} is damaged: it names no weight files")
    return paths


def placements(index: Path) -> dict[str, str]:
    """Tensor name -> name of its file, as an index has it.

    Raises:
        InputFileError: The index is damaged.
    """
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputFileError(f"{index} is damaged: it does not map tensors to files") from error


def unread_weights(directory: Path) -> list[str]:
    """Names of files that look like weights, for a message about a directory where none can be read."""
    return [path.name for pattern in _WEIGHTS for path in sorted(directory.glob(pattern))]


def first_names(names: list[str], most: int = 3) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _config_weight_files(directory: Path, file_name: object) -> WeightFiles:
    if not isinstance(file_name, str) or not file_name.endswith((".safetensors", ".safetensors.index.json")):
        raise InputFileError(f"{directory / 'config.json'}: transformers_weights {file_name!r} is no safetensors file")
    path = directory / file_name
    if not _is_inside(path, directory):
        raise InputFileError(
            f"{directory / 'config.json'}: transformers_weights '{file_name}' is outside of the directory"
        )
    if not path.is_file():
        raise InputFileError(f"{directory}: {file_name} is missing, config.json names it as transformers_weights")
    return WeightFiles((path,)) if path.suffix == ".safetensors" else WeightFiles(weight_files(directory, path), path)


def _is_inside(path: Path, directory: Path) -> bool:
    # By the names alone: a downloaded model's files are links to where they are kept.
    return Path(os.path.abspath(directory)) in Path(os.path.abspath(path)).parents
