"""A Hugging Face model built from its `config.json` alone, its parameters on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kraken_compiler.capture.quiet import quiet_transformers
from kraken_compiler.capture.weightless import parameters_on_meta
from kraken_compiler.errors import InputFileError, Rejection, UnsupportedModelError, first_line
from kraken_compiler.weights.scaled_checkpoint import Float8Config


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a directory's `config.json`.

    Raises:
        InputFileError: It is missing or damaged.
    """
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputFileError(f"{path / 'config.json'} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise InputFileError(f"{path / 'config.json'} is damaged: it is no JSON object")
    return fields


def read_config(path: Path, fields: dict[str, Any]) -> Any:
    """The config as transformers reads it, `fields` being what `config.json` holds.

    Raises:
        InputFileError: It does not describe a model.
        UnsupportedModelError: transformers does not know the architecture, or it is of a kind we do not take.
    """
    from transformers import AutoConfig

    if "auto_map" in fields and not _known_type(fields.get("model_type")):
        raise unsupported(
            "its architecture is Python code next to the weights (auto_map in config.json), which is never executed",
            "Load the model yourself and pass the module to kraken_compiler.transform.",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Configs check themselves in code of their own, which raises what it likes.
        if not _known_type(fields.get("model_type")):
            raise unsupported(
                f"transformers does not know the architecture that {path / 'config.json'} describes "
                f"(model_type {fields.get('model_type')!r})",
                "A newer transformers may.",
            ) from error
        raise _not_buildable(path, error) from error
    return config


def quantization_of(fields: dict[str, Any]) -> Float8Config | str | None:
    """The quantisation of a model's weights: float8 with scales, or the name of a library that reads them.

    Raises:
        UnsupportedModelError: In a way that cannot be read.
    """
    nested = [part.get("quantization_config") for part in fields.values() if isinstance(part, dict)]
    settings = fields.get("quantization_config") or next(filter(None, nested), None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "torchao":
        return "torchao"
    if method == "fp8":
        block = settings.get("weight_block_size")
        is_block = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        if block is not None and not is_block:
            raise unsupported(f"the weight_block_size of its float8 weights is {block!r}, not two sizes")
        return Float8Config("fp8", (block[0], block[1]) if is_block else None, settings.get("scale_fmt") == "ue8m0")
    if method == "compressed-tensors" and (obstacle := _float8_obstacle(settings)) is None:
        return Float8Config("compressed-tensors", _block_of_groups(settings["config_groups"]))
    by_method = f" by {method}" if method else ""
    detail = f" ({obstacle})" if method == "compressed-tensors" else ""
    raise unsupported(
        f"its weights are quantized{by_method}{detail}",
        "Weight-only integers of torchao and float8 weights with scales can be read; save it unquantized, or as those.",
    )


def build(config: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device, of the element types that transformers gives them.

    Raises:
        InputFileError: The config describes no model that can be built.
    """
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
            _keep_in_float32(model, dtype)
            return model
    assert failure is not None
    raise _not_buildable(path, failure) from failure


def architecture_of(config: Any) -> Any:
    """The class that the config names, or else the automatic class of its kind of model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    class_name = (getattr(config, "architectures", None) or [""])[0]
    if class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not hasattr(transformers, class_name):
        return _automatic(config)
    return getattr(transformers, class_name)


def _automatic(config: Any) -> Any:
    """The automatic class that knows a config's kind of model."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        for automatic in (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSpeechSeq2Seq):
            if type(config) in automatic._model_mapping:
                return automatic
    return transformers.AutoModelForCausalLM


def named_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def unsupported(reason: str, hint: str = "") -> UnsupportedModelError:
    """An error about the model as a whole."""
    return UnsupportedModelError([Rejection(reason, hint=hint)])


def _known_type(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _float8_obstacle(settings: dict[str, Any]) -> str | None:
    """The reason why weights of compressed-tensors are not floats of 8 bits with a scale; None if they are."""
    groups = settings.get("config_groups")
    if settings.get("format") not in ("float-quantized", "naive-quantized"):
        return f"format {settings.get('format')}"
    if settings.get("transform_config"):
        return "with transforms of the weights"
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        return "with sparse weights"
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    if not all(isinstance(one, dict) and (one.get("type"), one.get("num_bits")) == ("float", 8) for one in weights):
        return "with weights that are no floats of 8 bits"
    return None


def _block_of_groups(groups: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by what compressed-tensors says of its groups; None if it does not say."""
    blocks = set()
    for weights in (group["weights"] for group in groups.values()):
        block, columns = weights.get("block_structure"), weights.get("group_size")
        if weights.get("strategy") == "block" and block is not None:
            blocks.add(tuple(block) if isinstance(block, list) else block)
        elif weights.get("strategy") == "group" and columns is not None:
            blocks.add((1, columns))
    block = next(iter(blocks), None)
    if len(blocks) > 1 or block is None:
        return None
    if not (isinstance(block, tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise unsupported(f"the block_structure or group_size of its float8 weights is {block!r}, no sizes")
    return block[0], block[1]


def _instantiate(config: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    architecture = architecture_of(config)
    model: nn.Module
    if hasattr(architecture, "from_config"):
        model = architecture.from_config(config, attn_implementation=attention, dtype=dtype, trust_remote_code=False)
    else:
        model = architecture._from_config(config, attn_implementation=attention, dtype=dtype)
    return model


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Give float32 to the parameters that loading leaves in it (routers' biases, some output projections)."""
    from transformers.core_model_loading import build_glob_alternation

    dtype_plan = model._get_dtype_plan(dtype)
    if not dtype_plan:
        return
    pattern, globs, _ = build_glob_alternation(list(dtype_plan))
    for name, tensor in named_state(model).items():
        match = pattern.search(name)
        if match is None or match.lastgroup is None or name not in model.state_dict():
            continue
        plan_dtype = dtype_plan[globs[match.lastgroup]]
        if tensor.dtype != plan_dtype and tensor.is_floating_point():
            tensor.data = tensor.data.to(plan_dtype)


def _not_buildable(path: Path, error: Exception) -> InputFileError:
    reason = first_line(error)
    return InputFileError(f"{path / 'config.json'} does not describe a model that can be built: {reason}")
