"""Capture a GGUF file through transformers, which dequantizes it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.captured_model import Capture, TokenizerSource, files_digester
from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.capture.from_module import capture_module
from kraken_compiler.capture.gguf_file import GgufFile
from kraken_compiler.capture.gguf_headers import GgufHeaders
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.errors import InputFileError, Rejection, UnsupportedModelError, first_line, missing_packages
from kraken_compiler.weights.checkpoint_files import ADAPTER_CONFIG


def capture_gguf(
    path: Path,
    *,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    hash_early: bool = False,
) -> Capture:
    """Capture the model in a GGUF file; its dequantized weights are held in memory once.

    Args:
        path: The file.
        example_inputs, input_specs: What to trace with; inferred if neither is given.
        dtype: Element type of the dequantized weights; default float32.
        hash_early: See `capture`.

    Raises:
        InputFileError: The file is damaged, incomplete, or holds what transformers passes over.
        UsageError: The packages that read it are not installed.
        UnsupportedModelError: transformers cannot read this architecture from GGUF.
    """
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_packages(f"reading the GGUF file {path}", error) from error
    if (path.parent / ADAPTER_CONFIG).is_file():
        raise InputFileError(f"an adapter lies beside {path}: merge it into the model, or move one of the two away")
    digest = files_digester((path,), early=hash_early)
    try:
        headers = GgufHeaders()
        with headers.shared():
            file = GgufFile.open(path)
            file.require_whole()
            model, loading_info = _load(path, dtype or torch.float32)
            file.require_sizes(loading_info["mismatched_keys"])
            file.require_complete(loading_info["missing_keys"])
            notes = file.settle_unread(model, loading_info["unexpected_keys"])
    except ImportError as error:
        raise missing_packages(f"reading the GGUF file {path}", error) from error
    except NotImplementedError as error:
        raise _unreadable(path, error) from error
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, struct.error) as error:
        if "not supported" in str(error):
            raise _unreadable(path, error) from error
        raise InputFileError(f"{path} is truncated, damaged or no model: {first_line(error)}") from error
    if not file.has_tokenizer:
        notes = (*notes, f"{path.name} holds no tokenizer: give token ids, not text (--input-ids)")
    capture = capture_module(
        model,
        example_inputs=example_inputs,
        input_specs=input_specs,
        kind="gguf",
        path=str(path),
        digest=digest,
        tokenizer=TokenizerSource(str(path.parent), path.name, headers) if file.has_tokenizer else None,
    )
    # What the class of its config says by default is nothing that the file says: its tokenizer does.
    return replace(capture, notes=(*capture.notes, *notes), stop_tokens=())


def _load(path: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what transformers says about loading it."""
    import transformers

    automatic: Any = transformers.AutoModelForCausalLM
    with quiet_transformers():
        model, loading_info = automatic.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in what is returned
        )
    return model, loading_info


def _unreadable(path: Path, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError([Rejection(f"transformers cannot read {path}: {first_line(error)}")])
