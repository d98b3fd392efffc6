"""Capture a GGUF file through transformers, which dequantizes it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from kraken_compiler.capture.example_inputs import ExampleInputs
from kraken_compiler.capture.from_module import capture_module
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.capture.record import Capture, TokenizerSource, files_digester
from kraken_compiler.errors import InputFileError, Rejection, UnsupportedModelError
from kraken_compiler.optional_packages import missing_packages


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
        InputFileError: The file is damaged.
        UsageError: The packages that read it are not installed.
        UnsupportedModelError: transformers cannot read this architecture from GGUF.
    """
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise missing_packages(f"reading the GGUF file {path}", error) from error
    directory = str(path.parent)
    digest = files_digester((path,), early=hash_early)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                gguf_file=path.name,
                dtype=dtype or torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
    except ImportError as error:
        raise missing_packages(f"reading the GGUF file {path}", error) from error
    except NotImplementedError as error:
        raise _unreadable(path, error) from error
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, struct.error) as error:
        if "not supported" in str(error):
            raise _unreadable(path, error) from error
        raise InputFileError(f"{path} is truncated, damaged or no model: {_first_line(error)}") from error
    return capture_module(
        model,
        example_inputs=example_inputs,
        input_specs=input_specs,
        kind="gguf",
        path=str(path),
        digest=digest,
        tokenizer=TokenizerSource(directory, path.name),
    )


def _unreadable(path: Path, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError([Rejection(f"transformers cannot read {path}: {_first_line(error)}")])


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
