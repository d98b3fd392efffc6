"""Capture a Hugging Face directory: the graph from `config.json` alone, the weights read lazily from their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.artifact.tokenizer_files import stop_tokens_of_model
from kraken_compiler.capture.captured_model import Capture, Origin, TokenizerSource, files_digester
from kraken_compiler.capture.example_inputs import CallExample, ExampleInputs, resolve
from kraken_compiler.capture.export_module import export_module
from kraken_compiler.capture.from_adapter import with_adapter
from kraken_compiler.capture.from_module import capture_module, class_name, config_dict, program_of
from kraken_compiler.capture.from_quantized_directory import capture_quantized_directory
from kraken_compiler.capture.huggingface_model import (
    architecture_of,
    build,
    quantization_of,
    read_config,
    read_fields,
    unsupported,
)
from kraken_compiler.capture.model_directory import (
    ModelDirectory,
    Reading,
    expected_tensors,
    open_checkpoint,
    own_dtype,
    read_as,
    require_complete,
    without_weights,
)
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.capture.run_source import OpenModel, directory_reference, filled_reference
from kraken_compiler.capture.weightless import fake_parameters
from kraken_compiler.errors import missing_packages
from kraken_compiler.ir.calls import InputSpec
from kraken_compiler.weights.checkpoint import Checkpoint
from kraken_compiler.weights.checkpoint_files import WeightFiles, find_weight_files
from kraken_compiler.weights.checkpoint_store import CheckpointStore
from kraken_compiler.weights.scaled_checkpoint import Float8Config, ScaledCheckpoint

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

_FILLED_BYTES = 1 << 30
"""Float8 files of up to this many bytes are held as a model of their products while lanes are checked."""


def capture_directory(
    path: Path,
    *,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    trust_pickle: bool = False,
    dtype: torch.dtype | None = None,
    require_weights: bool = True,
    hash_early: bool = False,
) -> Capture:
    """Capture the model that a directory's `config.json` describes.

    Args:
        path: The directory.
        example_inputs, input_specs: What to trace with; inferred if neither is given.
        trust_pickle: Accept `pytorch_model.bin`.
        dtype: Element type of the model; default: the config's, else the checkpoint's, else float32.
        require_weights: Fail if there are no weight files.
        hash_early: See `capture`.

    Raises:
        InputFileError: A file is missing or damaged, or the files do not say which values a tensor has.
        UsageError: The packages that read it are not installed.
        UnsupportedModelError: transformers does not know the architecture, or it is of a kind we do not take.
    """
    contents = _open(path, trust_pickle=trust_pickle, require_weights=require_weights, hash_early=hash_early)
    if contents.quantization == "torchao":
        return capture_quantized_directory(
            path,
            architecture_of(contents.config),
            example_inputs=example_inputs,
            input_specs=input_specs,
            dtype=dtype,
            digest=contents.digest,
            tokenizer=contents.tokenizer,
        )
    meta = _build(contents, dtype or own_dtype(contents.config, contents.checkpoint))
    adapter = contents.parts.adapter
    if adapter and meta.checkpoint is not None and require_weights:
        return _capture_with_adapter(contents, meta, example_inputs, input_specs)
    capture = _capture_without_values(contents, meta, example_inputs, input_specs)
    notes = (f"the adapter in {path} will be merged into the weights",) if adapter else ()
    return replace(capture, notes=(*capture.notes, *notes))


@dataclass(frozen=True)
class _DirectoryContents:
    """Everything that is read of a model directory but the weights.

    Attributes:
        path: The directory, which may hold an adapter only.
        parts: Where the model and the adapter are.
        files: The weight files; None if there are none.
        checkpoint: Those files, opened; None if there are none, or they are pickles that are not trusted.
        config: The model's, as transformers reads it.
        quantization: How its weights are quantised.
        digest: Computes the hash of all of it.
        tokenizer: Its tokenizer, if it has one.
    """

    path: Path
    parts: ModelDirectory
    files: WeightFiles | None
    checkpoint: Checkpoint | None
    config: Any
    quantization: Float8Config | str | None
    digest: Callable[[], str]
    tokenizer: TokenizerSource | None


@dataclass(frozen=True)
class _MetaModel:
    """The model of a directory, its parameters on the meta device, and where their values are.

    Attributes:
        model: A `transformers.PreTrainedModel`.
        dtype: Its element type.
        checkpoint: The weight files as the model's numbers.
        reading: What every tensor is read from.
        notes: What a user should know, one sentence each.
    """

    model: nn.Module
    dtype: torch.dtype
    checkpoint: Checkpoint | None
    reading: Reading
    notes: tuple[str, ...]


def _open(path: Path, *, trust_pickle: bool, require_weights: bool, hash_early: bool) -> _DirectoryContents:
    """Read what a directory says of its model."""
    parts = ModelDirectory.at(path, trust_pickle=trust_pickle)
    base = parts.base
    fields = read_fields(base)
    files = find_weight_files(base, fields.get("transformers_weights"))
    checkpoint = open_checkpoint(base, files, trust_pickle=trust_pickle)
    source_files = (base / "config.json", *parts.adapter, *(checkpoint.files if checkpoint is not None else ()))
    # Before anything that takes seconds.
    digest = files_digester(source_files, early=hash_early)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_packages(f"reading the Hugging Face directory {path}", error) from error
    quantization = quantization_of(fields)
    with quiet_transformers():
        config = read_config(base, fields)
    if checkpoint is None and (require_weights or quantization == "torchao"):
        raise without_weights(base, files)
    if quantization == "torchao" and parts.adapter:
        raise unsupported("it holds an adapter beside quantized weights", "Merge it before they are quantized.")
    tokenizer = tokenizer_in(path) or tokenizer_in(base)
    return _DirectoryContents(path, parts, files, checkpoint, config, quantization, digest, tokenizer)


def _build(contents: _DirectoryContents, dtype: torch.dtype) -> _MetaModel:
    """Make the model, and find its tensors in the files."""
    config, checkpoint = contents.config, contents.checkpoint
    notes: tuple[str, ...] = ()
    if checkpoint is not None:
        float8 = contents.quantization if isinstance(contents.quantization, Float8Config) else None
        checkpoint, notes = ScaledCheckpoint.over(checkpoint, float8)
    if contents.quantization is not None:
        del config.quantization_config  # what is read are plain numbers
    model = build(config, contents.parts.base, dtype)
    reading = Reading({})
    if checkpoint is not None and contents.files is not None:
        reading = read_as(model, checkpoint, contents.files, contents.parts.base)
    return _MetaModel(model, dtype, checkpoint, reading, (*notes, *reading.notes))


def _capture_with_adapter(
    contents: _DirectoryContents, meta: _MetaModel, example_inputs: ExampleInputs | None, input_specs: Sequence[str]
) -> Capture:
    """Capture the model with its values in memory, the adapter merged into them."""
    path, model, checkpoint = contents.path, meta.model, meta.checkpoint
    assert checkpoint is not None
    names = model.state_dict()
    require_complete(model, names, meta.reading, checkpoint)
    expected = expected_tensors(model, names)
    store = CheckpointStore(checkpoint, meta.reading.sources, expected, contents.parts.base)
    capture = capture_module(
        with_adapter(model, store, path),
        example_inputs=example_inputs,
        input_specs=input_specs,
        kind="huggingface",
        path=str(path),
        digest=contents.digest,
        tokenizer=contents.tokenizer,
    )
    merge_note = f"the adapter in {path} is merged into the weights"
    return replace(capture, notes=(*capture.notes, *meta.notes, merge_note))


def _capture_without_values(
    contents: _DirectoryContents, meta: _MetaModel, example_inputs: ExampleInputs | None, input_specs: Sequence[str]
) -> Capture:
    """Capture the model without its values."""
    model, checkpoint = meta.model, meta.checkpoint
    example = resolve(model, example_inputs, input_specs)
    with fake_parameters(model) as mode:
        # The inputs must belong to the parameters' fake mode, or torch.export makes a second one.
        exported = export_module(model, example.map_tensors(mode.from_tensor), allow_strict=False)
    program, notes = program_of(exported, model, example)
    expected = expected_tensors(model, exported.state_dict)
    store = CheckpointStore(checkpoint, meta.reading.sources, expected, contents.parts.base)
    if checkpoint is not None:
        require_complete(model, expected, meta.reading, checkpoint)
        store.validate()
    origin = Origin(
        kind="huggingface",
        path=str(contents.path),
        model_class=class_name(model),
        digest=contents.digest,
        tokenizer=contents.tokenizer,
    )
    reference = _reference(contents, meta, store, example, program.inputs)
    stop_tokens = stop_tokens_of_model(contents.parts.base)
    return Capture(
        program, store, origin, config_dict(model), (*notes, *meta.notes), reference, stop_tokens=stop_tokens
    )


def _reference(
    contents: _DirectoryContents,
    meta: _MetaModel,
    store: CheckpointStore,
    example: CallExample,
    inputs: Sequence[InputSpec],
) -> OpenModel | None:
    """The function that opens the model itself; None if it cannot be run, and then the capture stands for it."""
    checkpoint = meta.checkpoint
    if checkpoint is None:
        return None
    if isinstance(checkpoint, ScaledCheckpoint):
        # transformers runs float8 on GPUs, or takes the numbers for the weights where no config says what they are. A
        # model of the products is all in memory.
        small = sum(file.stat().st_size for file in checkpoint.files) <= _FILLED_BYTES
        return partial(filled_reference, meta.model, store, example, inputs) if small else None
    if contents.parts.adapter:
        return None
    return partial(
        directory_reference, contents.parts.base, architecture_of(contents.config), meta.dtype, example, inputs
    )


def tokenizer_in(directory: Path) -> TokenizerSource | None:
    """The tokenizer of a directory; None if it has none."""
    has_files = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return TokenizerSource(str(directory)) if has_files else None
