"""The `[model]` table of a config file. Imports no torch.

[model]
preset = "kraken-125m-2"      # where to begin; every other key of `KrakenConfig` changes it
vocabulary = 8192
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from kraken_compiler.errors import UsageError
from kraken_compiler.native.config import PRESETS, KrakenConfig
from kraken_compiler.options.command_options import read_toml

MODEL_TABLE = "model"
_PRESET = "preset"


def model_in(path: Path) -> KrakenConfig:
    """The model that a config file describes.

    Args:
        path: The file.

    Raises:
        UsageError: It describes none; says which key is wrong.
        InputFileError: The file cannot be read, or is no TOML.
    """
    table = read_toml(path, "CONFIG").get(MODEL_TABLE)
    if not isinstance(table, dict):
        raise UsageError(f"{path}: there is no table [{MODEL_TABLE}], which says what is trained")
    try:
        return _config(table)
    except UsageError as error:
        raise UsageError(f"{path}: [{MODEL_TABLE}]: {error}") from error


def _config(table: Mapping[str, Any]) -> KrakenConfig:
    kinds = get_type_hints(KrakenConfig)
    names = [field.name for field in fields(KrakenConfig)]
    for key, value in table.items():
        if key == _PRESET:
            continue
        if key not in names:
            nearest = difflib.get_close_matches(key, [*names, _PRESET], n=1, cutoff=0.0)[0]
            raise UsageError(f"there is no key '{key}'; did you mean '{nearest}'?")
        wanted = kinds[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (isinstance(value, str) if wanted is str else whole or (wanted is float and isinstance(value, float))):
            kind = {str: "text", float: "a number"}.get(wanted, "a whole number")
            raise UsageError(f"{key} must be {kind}, not {value!r}")
    preset = table.get(_PRESET)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise UsageError(f"there is no preset '{preset}'; choose from {', '.join(PRESETS)}")
    begin = PRESETS[preset] if preset is not None else KrakenConfig()
    return replace(begin, **{key: value for key, value in table.items() if key != _PRESET})
