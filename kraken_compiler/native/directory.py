"""Kraken models on the disk: `config.json` and `model.safetensors`, as Hugging Face directories have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kraken_compiler.errors import InputFileError, os_errors_as
from kraken_compiler.native.config import KrakenConfig
from kraken_compiler.native.model import KrakenLM

MODEL_TYPE = "kraken_lm"
_HUB_PREFIX = "model."
"""Before every name where `KrakenForCausalLM` has written the weights."""
_HUB_NAMES = {"vocab_size": "vocabulary", "max_position_embeddings": "context"}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_native(model: KrakenLM, directory: Path) -> None:
    """Write a model into a directory, which is made.

    Raises:
        InputFileError: It cannot be written.
    """
    with os_errors_as(f"cannot write {directory}"), _safetensors_errors_as(f"cannot write {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, "architectures": ["KrakenLM"], **model.config.to_dict()}
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


@contextmanager
def _safetensors_errors_as(what: str) -> Iterator[None]:
    """Turn what safetensors says of a full disk into an `InputFileError`."""
    try:
        yield
    except SafetensorError as error:
        raise InputFileError(f"{what}: {error}") from error


def load_native(directory: Path, dtype: torch.dtype | None = None) -> KrakenLM:
    """The model that a directory holds, in evaluation mode.

    Args:
        directory: See `save_native`.
        dtype: Convert it to this element type; None leaves its own.

    Raises:
        InputFileError: A file is missing or damaged.
        UsageError: The config describes no model.
    """
    config = native_config(directory)
    if config is None:
        raise InputFileError(f"{directory} holds no Kraken model: its config.json is of another kind")
    weights = directory / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputFileError(f"{weights}: cannot be read: {error}") from error
    tensors = {name.removeprefix(_HUB_PREFIX): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = KrakenLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = next((name for name in expected if found.get(name) != expected[name]), None)
    if wrong is not None:
        shape = f"has the shape {list(found[wrong])}" if wrong in found else "is missing"
        raise InputFileError(f"{weights}: '{wrong}' {shape}; config.json wants {list(expected[wrong])}")
    model.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return (model if dtype is None else model.to(dtype)).eval()


def native_model(source: object) -> KrakenLM | None:
    """A Kraken model, by itself or behind our own face for transformers; None if something is neither."""
    # By name: importing it would import transformers. Whatever else has a model inside may do more than to call it.
    is_face = f"{type(source).__module__}.{type(source).__qualname__}" == f"{__package__}.huggingface.KrakenForCausalLM"
    found = getattr(source, "model", None) if is_face else source
    return found if isinstance(found, KrakenLM) else None


def native_config(directory: Path) -> KrakenConfig | None:
    """The config of a Kraken model's directory; None if it is another model's.

    Raises:
        InputFileError: It is a Kraken model's and damaged.
        UsageError: It describes no model.
    """
    path = directory / CONFIG_FILE
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads other models' configs says what is wrong
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        return None
    values = {_HUB_NAMES.get(name, name): value for name, value in values.items()}
    names = {field.name for field in fields(KrakenConfig)}
    try:
        return KrakenConfig(**{name: value for name, value in values.items() if name in names})
    except TypeError as error:
        raise InputFileError(f"{path}: {error}") from error
