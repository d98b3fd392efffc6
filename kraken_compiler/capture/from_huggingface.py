"""Capture a Hugging Face directory: the graph from `config.json` alone, the weights read lazily from their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.checkpoint_map import map_checkpoint
from kraken_compiler.capture.example_inputs import ExampleInputs, resolve
from kraken_compiler.capture.export_module import export_module
from kraken_compiler.capture.from_module import class_name, config_dict, forward_parameters
from kraken_compiler.capture.from_quantized_directory import capture_quantized_directory
from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.capture.record import Capture, Origin, TokenizerSource, files_digester
from kraken_compiler.capture.weightless import fake_parameters, parameters_on_meta
from kraken_compiler.errors import InputFileError, Rejection, UnsupportedModelError
from kraken_compiler.optional_packages import missing_packages
from kraken_compiler.weights.checkpoint import Checkpoint, PickledCheckpoint, SafetensorsCheckpoint, weight_files
from kraken_compiler.weights.checkpoint_store import CheckpointStore, ExpectedTensor

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


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
        InputFileError: A file is missing or damaged.
        UsageError: The packages that read it are not installed.
        UnsupportedModelError: transformers does not know the architecture, or it is of a kind we do not take.
    """
    checkpoint = _open_checkpoint(path, trust_pickle=trust_pickle)
    files = (path / "config.json", *(checkpoint.files if checkpoint is not None else ()))
    # Before anything that takes seconds.
    digest = files_digester(files, early=hash_early)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_packages(f"reading the Hugging Face directory {path}", error) from error
    with quiet_transformers():
        config = _read_config(path)
    quantized = getattr(config, "quantization_config", None) is not None
    if checkpoint is None and (require_weights or quantized):
        raise _without_weights(path)
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = TokenizerSource(str(path)) if has_tokenizer else None
    if quantized:
        return capture_quantized_directory(
            path,
            _architecture(config),
            example_inputs=example_inputs,
            input_specs=input_specs,
            dtype=dtype,
            digest=digest,
            tokenizer=tokenizer,
        )
    model = _build(config, path, dtype or _own_dtype(config, checkpoint))
    example = resolve(model, example_inputs, input_specs)
    with fake_parameters(model) as mode:
        # The inputs must belong to the parameters' fake mode, or torch.export makes a second one.
        example = example.map_tensors(mode.from_tensor)
        exported = export_module(model, example, allow_strict=False)
    program, notes = build_program(exported, parameters=forward_parameters(model), model_class=class_name(model))

    expected = {
        name: ExpectedTensor(tensor.dtype, tuple(tensor.shape))
        for name, tensor in _named_state(model).items()
        if name in exported.state_dict
    }
    sources = map_checkpoint(model, checkpoint) if checkpoint is not None else {}
    store = CheckpointStore(checkpoint, sources, expected, path)
    if checkpoint is not None:
        store.validate()
    origin = Origin(
        kind="huggingface",
        path=str(path),
        model_class=class_name(model),
        digest=digest,
        tokenizer=tokenizer,
    )
    return Capture(program, store, origin, config_dict(model), notes)


def _read_config(path: Path) -> Any:
    import json

    from transformers import AutoConfig

    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path / 'config.json'} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise InputFileError(f"{path / 'config.json'} is damaged: it is no JSON object")
    quantization = fields.get("quantization_config")
    if quantization and (not isinstance(quantization, dict) or quantization.get("quant_method") != "torchao"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise _unsupported(
            f"its weights are quantized{f' by {method}' if method else ''}",
            "Weight-only integers of torchao can be read; save it unquantized, or quantized by those.",
        )
    if "auto_map" in fields and not _known_type(fields.get("model_type")):
        raise _unsupported(
            "its architecture is Python code next to the weights (auto_map in config.json), which is never executed",
            "Load the model yourself and pass the module to kraken_compiler.transform.",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Configs check themselves in code of their own, which raises what it likes.
        if not _known_type(fields.get("model_type")):
            raise _unsupported(
                f"transformers does not know the architecture that {path / 'config.json'} describes "
                f"(model_type {fields.get('model_type')!r})",
                "A newer transformers may.",
            ) from error
        raise _not_buildable(path, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported("encoder-decoder models are not supported yet")
    return config


def _known_type(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _build(config: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device."""
    failure: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            with parameters_on_meta(), quiet_transformers():
                model = _instantiate(config, attention, dtype)
        except ValueError as error:
            # transformers says so this way when a class has no such attention.
            failure = error
        except (TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            failure = error
            break
        else:
            return model
    assert failure is not None
    raise _not_buildable(path, failure) from failure


def _instantiate(config: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    import transformers

    architecture = _architecture(config)
    automatic: Any = transformers.AutoModelForCausalLM
    model: nn.Module
    if architecture is automatic:
        model = architecture.from_config(config, attn_implementation=attention, dtype=dtype, trust_remote_code=False)
    else:
        model = architecture._from_config(config, attn_implementation=attention, dtype=dtype)
    return model


def _architecture(config: Any) -> Any:
    """The class that the config names, or the one that finds out which it is."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = (getattr(config, "architectures", None) or [""])[0]
    if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not hasattr(transformers, named):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, named)


def _own_dtype(config: Any, checkpoint: Checkpoint | None) -> torch.dtype:
    """The config's element type, else that of the checkpoint's first floating-point tensor, as transformers does."""
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(dtype, torch.dtype):
        return dtype
    kinds = [checkpoint.describe(key)[0] for key in checkpoint.names()] if checkpoint is not None else []
    for held in kinds:
        if held is not None and held.is_floating_point:
            return held
    return torch.float32


def _open_checkpoint(path: Path, *, trust_pickle: bool) -> Checkpoint | None:
    files = weight_files(path, ".safetensors", "model.safetensors.index.json", "model.safetensors")
    if files:
        return SafetensorsCheckpoint.open(files)
    pickled = _pickled_files(path)
    return PickledCheckpoint.open(pickled) if pickled and trust_pickle else None


def _pickled_files(path: Path) -> tuple[Path, ...]:
    files = weight_files(path, ".bin", "pytorch_model.bin.index.json", "pytorch_model.bin")
    return tuple(file for file in files if file.name.startswith("pytorch_model"))


def _without_weights(path: Path) -> InputFileError:
    pickled = _pickled_files(path)
    if not pickled:
        return InputFileError(f"{path} has no weight files (*.safetensors), only a config")
    return InputFileError(
        f"{path} has its weights only as {pickled[0].name}, a pickle, which can run any code when it is opened: "
        "save the model again with save_pretrained(..., safe_serialization=True), or pass --trust-pickle"
    )


def _named_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _not_buildable(path: Path, error: Exception) -> InputFileError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return InputFileError(f"{path / 'config.json'} does not describe a model that can be built: {reason}")


def _unsupported(reason: str, hint: str = "") -> UnsupportedModelError:
    return UnsupportedModelError([Rejection(reason, hint=hint)])
