"""The entry point of capture: detects the kind of a source and calls the module that captures it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from kraken_compiler.capture.captured_model import Capture
from kraken_compiler.capture.example_inputs import CallExample, ExampleInputs
from kraken_compiler.capture.from_module import capture_module
from kraken_compiler.capture.source_kind import SourceKind, detect
from kraken_compiler.capture.unwrap import what_to_pass
from kraken_compiler.errors import UsageError
from kraken_compiler.native.directory import native_config, native_model

Model = nn.Module | ExportedProgram | str | os.PathLike[str]
"""A module, or the path of anything that can be captured."""


def capture(
    source: Model,
    *,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    trust_pickle: bool = False,
    dtype: torch.dtype | None = None,
    require_weights: bool = True,
    hash_early: bool = False,
) -> Capture:
    """Capture a model as a program of degree 1 with dynamic batch and sequence sizes.

    Args:
        source: A module, a Hugging Face directory, a `.gguf` file, a `torch.export` archive, or a pickled module.
            Files are recognised by their content.
        example_inputs: Arguments to trace with, positional (a tuple) or named (a dict); sizes of at least 2. Inferred
            for Hugging Face models.
        input_specs: The same as texts, e.g. `input_ids=int64[2,16]`.
        trust_pickle: Allow files that can run any code when they are opened.
        dtype: Element type of the captured model; default: the source's own.
        require_weights: With False, a Hugging Face directory needs no weight files (planning reads none).
        hash_early: The hash of the files (`Origin.sha256`) will be asked for: begin with it during the capture.

    Raises:
        UsageError: The example inputs are missing or do not fit.
        InputFileError: The source is missing, damaged, or must not be opened.
        UnsupportedModelError: The model cannot be captured.
    """
    if dtype is not None and not dtype.is_floating_point:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"a model cannot be compiled as {name}: give an element type of fractions, e.g. bfloat16")
    native = native_model(source)
    if native is not None:
        from kraken_compiler.capture.from_native import capture_native

        return capture_native(native, dtype=dtype)
    if isinstance(source, nn.Module):
        return capture_module(source, example_inputs=example_inputs, input_specs=input_specs, dtype=dtype)
    if isinstance(source, ExportedProgram):
        has_inputs = example_inputs is not None or bool(input_specs)
        example = CallExample(*source.example_inputs) if source.example_inputs and not has_inputs else example_inputs
        return capture_module(source.module(), example_inputs=example, input_specs=input_specs, dtype=dtype)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(what_to_pass(source))
    path = Path(source)
    kind = detect(path)
    # Imported here, so that a live module needs nothing of what the others do.
    if kind is SourceKind.HUGGINGFACE and native_config(path) is not None:
        from kraken_compiler.capture.from_native import capture_native_directory

        return capture_native_directory(path, dtype=dtype, with_weights=require_weights, hash_early=hash_early)
    if kind is SourceKind.HUGGINGFACE:
        from kraken_compiler.capture.from_huggingface import capture_directory

        return capture_directory(
            path,
            example_inputs=example_inputs,
            input_specs=input_specs,
            trust_pickle=trust_pickle,
            dtype=dtype,
            require_weights=require_weights,
            hash_early=hash_early,
        )
    if kind is SourceKind.GGUF:
        from kraken_compiler.capture.from_gguf import capture_gguf

        return capture_gguf(
            path, example_inputs=example_inputs, input_specs=input_specs, dtype=dtype, hash_early=hash_early
        )
    if kind is SourceKind.EXPORT:
        from kraken_compiler.capture.from_archive import capture_archive

        if example_inputs is not None or input_specs or dtype is not None:
            raise UsageError(f"{path} is a torch.export archive: its inputs and element types were fixed at export")
        return capture_archive(path, trust_pickle=trust_pickle)
    from kraken_compiler.capture.from_pickle import capture_pickle

    return capture_pickle(
        path, example_inputs=example_inputs, input_specs=input_specs, trust_pickle=trust_pickle, dtype=dtype
    )
