"""Capture a module saved by `torch.save`: only on request, because opening a pickle can run any code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler.capture.captured_model import Capture, digest_files
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.capture.from_module import capture_module
from kraken_compiler.capture.quiet import quiet_torch
from kraken_compiler.errors import InputFileError, first_line

INSTEAD = (
    "save the model with torch.export.save(torch.export.export(...), path), give a Hugging Face directory, "
    "or pass --trust-pickle if you trust where the file comes from"
)


def capture_pickle(
    path: Path,
    *,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    trust_pickle: bool = False,
    dtype: torch.dtype | None = None,
) -> Capture:
    """Capture a pickled module.

    Args:
        path: A file written by `torch.save(module, path)`.
        example_inputs, input_specs: What to trace with.
        trust_pickle: Without it the file is only looked at with torch's restricted unpickler.
        dtype: Convert the module to this element type.

    Raises:
        InputFileError: The file is damaged, holds no module, or is not trusted.
    """
    # A state dict opens without running code, and "trust it" would be the wrong advice for one.
    _reject_tensors(path)
    if not trust_pickle:
        raise InputFileError(f"{path} is a pickle, which can run any code when it is opened: {INSTEAD}")
    model = _unpickle(path)
    if not isinstance(model, nn.Module):
        raise InputFileError(f"{path} holds a {type(model).__name__}, not an nn.Module")
    return capture_module(
        model,
        example_inputs=example_inputs,
        input_specs=input_specs,
        dtype=dtype,
        kind="pickle",
        path=str(path),
        digest=lambda: digest_files((path,)),
    )


def _reject_tensors(path: Path) -> None:
    try:
        # Mapped, so that a large state dict is not read for an error message.
        with quiet_torch():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        return
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise InputFileError(f"{path} is truncated or damaged: {first_line(error)}") from error
    tensors = _count_tensors(content)
    if tensors:
        raise InputFileError(
            f"{path} is a bare state dict ({tensors} tensors): the architecture is missing. Build the model in Python, "
            "load the state dict and pass the module to kraken_compiler.transform, or save it with torch.export.save; "
            "for a Hugging Face model, give the directory with its config.json"
        )
    raise InputFileError(f"{path} holds a {type(content).__name__}, not a model")


def _unpickle(path: Path) -> Any:
    try:
        with quiet_torch():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        # Unpickling runs the file's own code: any exception may come out of it.
        missing = isinstance(error, AttributeError | ImportError)
        hint = "; the module's class must be importable where you run this" if missing else ""
        raise InputFileError(f"{path} cannot be unpickled: {first_line(error)}{hint}") from error


def _count_tensors(content: Any) -> int:
    if isinstance(content, Tensor):
        return 1
    if isinstance(content, Mapping):
        return sum(map(_count_tensors, content.values()))
    return 0
