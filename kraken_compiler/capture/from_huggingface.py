"""Capture a Hugging Face directory: the graph from `config.json` alone, the weights read lazily from their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.example_inputs import ExampleInputs, resolve
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
from kraken_compiler.capture.record import Capture, Origin, TokenizerSource, files_digester
from kraken_compiler.capture.reference import OpenModel, directory_reference, filled_reference
from kraken_compiler.capture.weightless import fake_parameters
from kraken_compiler.optional_packages import missing_packages
from kraken_compiler.weights.checkpoint_files import find_weight_files
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
    tokenizer = _tokenizer(path) or _tokenizer(base)
    if quantization == "torchao":
        if parts.adapter:
            raise unsupported("it holds an adapter beside quantized weights", "Merge it before they are quantized.")
        return capture_quantized_directory(
            path,
            architecture_of(config),
            example_inputs=example_inputs,
            input_specs=input_specs,
            dtype=dtype,
            digest=digest,
            tokenizer=tokenizer,
        )
    dtype = dtype or own_dtype(config, checkpoint)
    notes: tuple[str, ...] = ()
    if checkpoint is not None:
        known = quantization if isinstance(quantization, Float8Config) else None
        checkpoint, notes = ScaledCheckpoint.over(checkpoint, known)
    if quantization is not None:
        del config.quantization_config  # what is read are plain numbers
    model = build(config, base, dtype)
    reading = Reading({})
    if checkpoint is not None and files is not None:
        reading = read_as(model, checkpoint, files, base)
    notes = (*notes, *reading.notes)
    if parts.adapter and checkpoint is not None and require_weights:
        require_complete(model, model.state_dict(), reading, checkpoint)
        store = CheckpointStore(checkpoint, reading.sources, expected_tensors(model, model.state_dict()), base)
        captured = capture_module(
            with_adapter(model, store, path),
            example_inputs=example_inputs,
            input_specs=input_specs,
            kind="huggingface",
            path=str(path),
            digest=digest,
            tokenizer=tokenizer,
        )
        return replace(captured, notes=(*captured.notes, *notes, f"the adapter in {path} is merged into the weights"))
    if parts.adapter:
        notes = (*notes, f"the adapter in {path} will be merged into the weights")
    example = resolve(model, example_inputs, input_specs)
    with fake_parameters(model) as mode:
        # The inputs must belong to the parameters' fake mode, or torch.export makes a second one.
        exported = export_module(model, example.map_tensors(mode.from_tensor), allow_strict=False)
    program, own_notes = build_program(exported, parameters=forward_parameters(model), model_class=class_name(model))

    expected = expected_tensors(model, exported.state_dict)
    if checkpoint is not None:
        require_complete(model, expected, reading, checkpoint)
    store = CheckpointStore(checkpoint, reading.sources, expected, base)
    if checkpoint is not None:
        store.validate()
    origin = Origin(
        kind="huggingface",
        path=str(path),
        model_class=class_name(model),
        digest=digest,
        tokenizer=tokenizer,
    )
    opened: OpenModel | None = None
    if isinstance(checkpoint, ScaledCheckpoint):
        # transformers runs float8 on GPUs, or takes the numbers for the weights where no config says what they are. A
        # model of the products is all in memory; without one, what was captured stands for it.
        if sum(file.stat().st_size for file in checkpoint.files) <= _FILLED_BYTES:
            opened = partial(filled_reference, model, store, example, program.inputs)
    elif checkpoint is not None and not parts.adapter:
        opened = partial(directory_reference, base, architecture_of(config), dtype, example, program.inputs)
    return Capture(
        program,
        store,
        origin,
        config_dict(model),
        (*own_notes, *notes),
        opened,
    )


def _tokenizer(directory: Path) -> TokenizerSource | None:
    there = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return TokenizerSource(str(directory)) if there else None
