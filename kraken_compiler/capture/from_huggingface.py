"""Capture a Hugging Face directory: the graph from `config.json` alone, the weights read lazily from their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.captured_model import Capture, Origin, TokenizerSource, files_digester
from kraken_compiler.capture.example_inputs import CallExample, ExampleInputs, resolve
from kraken_compiler.capture.export_module import export_module
from kraken_compiler.capture.from_adapter import with_adapter
from kraken_compiler.capture.from_module import capture_module, class_name, config_dict, forward_parameters
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
    opened = _open(path, trust_pickle=trust_pickle, require_weights=require_weights, hash_early=hash_early)
    if opened.quantization == "torchao":
        return capture_quantized_directory(
            path,
            architecture_of(opened.config),
            example_inputs=example_inputs,
            input_specs=input_specs,
            dtype=dtype,
            digest=opened.digest,
            tokenizer=opened.tokenizer,
        )
    built = _build(opened, dtype or own_dtype(opened.config, opened.checkpoint))
    adapter = opened.parts.adapter
    if adapter and built.checkpoint is not None and require_weights:
        return _with_adapter(opened, built, example_inputs, input_specs)
    captured = _traced(opened, built, example_inputs, input_specs)
    notes = (f"the adapter in {path} will be merged into the weights",) if adapter else ()
    return replace(captured, notes=(*captured.notes, *notes))


@dataclass(frozen=True)
class _Opened:
    """A model directory of which everything is read but the weights.

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
class _Built:
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


def _open(path: Path, *, trust_pickle: bool, require_weights: bool, hash_early: bool) -> _Opened:
    """Read what a directory says of its model."""
    parts = ModelDirectory.at(path, trust_pickle=trust_pickle)
    base = parts.base
    fields = read_fields(base)
    files = find_weight_files(base, fields.get("transformers_weights"))
    checkpoint = open_checkpoint(base, files, trust_pickle=trust_pickle)
    digested = (base / "config.json", *parts.adapter, *(checkpoint.files if checkpoint is not None else ()))
    # Before anything that takes seconds.
    digest = files_digester(digested, early=hash_early)
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
    tokenizer = _tokenizer(path) or _tokenizer(base)
    return _Opened(path, parts, files, checkpoint, config, quantization, digest, tokenizer)


def _build(opened: _Opened, dtype: torch.dtype) -> _Built:
    """Make the model, and find its tensors in the files."""
    config, checkpoint = opened.config, opened.checkpoint
    notes: tuple[str, ...] = ()
    if checkpoint is not None:
        known = opened.quantization if isinstance(opened.quantization, Float8Config) else None
        checkpoint, notes = ScaledCheckpoint.over(checkpoint, known)
    if opened.quantization is not None:
        del config.quantization_config  # what is read are plain numbers
    model = build(config, opened.parts.base, dtype)
    reading = Reading({})
    if checkpoint is not None and opened.files is not None:
        reading = read_as(model, checkpoint, opened.files, opened.parts.base)
    return _Built(model, dtype, checkpoint, reading, (*notes, *reading.notes))


def _with_adapter(
    opened: _Opened, built: _Built, example_inputs: ExampleInputs | None, input_specs: Sequence[str]
) -> Capture:
    """Capture the model with its values in memory, the adapter merged into them."""
    path, model, checkpoint = opened.path, built.model, built.checkpoint
    assert checkpoint is not None
    names = model.state_dict()
    require_complete(model, names, built.reading, checkpoint)
    expected = expected_tensors(model, names)
    store = CheckpointStore(checkpoint, built.reading.sources, expected, opened.parts.base)
    captured = capture_module(
        with_adapter(model, store, path),
        example_inputs=example_inputs,
        input_specs=input_specs,
        kind="huggingface",
        path=str(path),
        digest=opened.digest,
        tokenizer=opened.tokenizer,
    )
    merged = f"the adapter in {path} is merged into the weights"
    return replace(captured, notes=(*captured.notes, *built.notes, merged))


def _traced(
    opened: _Opened, built: _Built, example_inputs: ExampleInputs | None, input_specs: Sequence[str]
) -> Capture:
    """Capture the model without its values."""
    model, checkpoint = built.model, built.checkpoint
    example = resolve(model, example_inputs, input_specs)
    with fake_parameters(model) as mode:
        # The inputs must belong to the parameters' fake mode, or torch.export makes a second one.
        exported = export_module(model, example.map_tensors(mode.from_tensor), allow_strict=False)
    program, notes = build_program(exported, parameters=forward_parameters(model), model_class=class_name(model))
    expected = expected_tensors(model, exported.state_dict)
    store = CheckpointStore(checkpoint, built.reading.sources, expected, opened.parts.base)
    if checkpoint is not None:
        require_complete(model, expected, built.reading, checkpoint)
        store.validate()
    origin = Origin(
        kind="huggingface",
        path=str(opened.path),
        model_class=class_name(model),
        digest=opened.digest,
        tokenizer=opened.tokenizer,
    )
    reference = _reference(opened, built, store, example, program.inputs)
    return Capture(program, store, origin, config_dict(model), (*notes, *built.notes), reference)


def _reference(
    opened: _Opened, built: _Built, store: CheckpointStore, example: CallExample, inputs: Sequence[InputSpec]
) -> OpenModel | None:
    """How the model itself is run; None if it cannot be, and then what was captured stands for it."""
    checkpoint = built.checkpoint
    if checkpoint is None:
        return None
    if isinstance(checkpoint, ScaledCheckpoint):
        # transformers runs float8 on GPUs, or takes the numbers for the weights where no config says what they are. A
        # model of the products is all in memory.
        small = sum(file.stat().st_size for file in checkpoint.files) <= _FILLED_BYTES
        return partial(filled_reference, built.model, store, example, inputs) if small else None
    if opened.parts.adapter:
        return None
    return partial(directory_reference, opened.parts.base, architecture_of(opened.config), built.dtype, example, inputs)


def _tokenizer(directory: Path) -> TokenizerSource | None:
    there = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return TokenizerSource(str(directory)) if there else None
