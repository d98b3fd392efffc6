"""Capture a Hugging Face directory whose weights torchao quantised; transformers puts them together, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.captured_model import Capture, TokenizerSource
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.capture.from_module import capture_module
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.errors import InputFileError, first_line, missing_packages
from kraken_compiler.weights.checkpoint_files import first_names


def capture_quantized_directory(
    path: Path,
    architecture: Any,
    *,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    digest: Callable[[], str],
    tokenizer: TokenizerSource | None = None,
) -> Capture:
    """Capture a directory of quantised weights; unlike plain ones, they are all in memory, as integers.

    Args:
        path: The directory.
        architecture: The class of transformers that reads it.
        example_inputs, input_specs: What to trace with; inferred if neither is given.
        dtype: Element type to convert to; quantised weights cannot be converted.
        digest, tokenizer: For `Origin`.

    Raises:
        InputFileError: A file is missing or damaged.
        UsageError: torchao is not installed, or `dtype` is not the type that the weights were quantised for.
        UnsupportedModelError: The weights are of a kind that cannot be divided.
    """
    model, notes = _load(path, architecture)
    capture = capture_module(
        model,
        example_inputs=example_inputs,
        input_specs=input_specs,
        dtype=dtype,
        kind="huggingface",
        path=str(path),
        digest=digest,
        tokenizer=tokenizer,
    )
    return replace(capture, notes=(*capture.notes, *notes))


def _load(path: Path, architecture: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and notes about what of the files is not read."""
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            model, loading_info = architecture.from_pretrained(
                str(path),
                attn_implementation="sdpa",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ImportError as error:
        raise missing_packages(f"reading the quantised weights of {path}", error, "quantized") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise InputFileError(f"{path}: transformers cannot read its quantised weights: {reason}") from error
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise InputFileError(f"{path}: {len(missing)} tensors are in none of its files ({missing[0]})")
    assert isinstance(model, nn.Module)
    unread = sorted(loading_info["unexpected_keys"])
    return model, (f"{len(unread)} tensors of the files are not read: {first_names(unread)}",) if unread else ()
