"""Capture a live `nn.Module`; its parameters are shared, never copied, but for integers that are packed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kraken_compiler.artifact.tokenizer_files import eos_in_config
from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.captured_model import Capture, Origin, TokenizerSource, digest_tensors
from kraken_compiler.capture.example_inputs import CallExample, ExampleInputs, is_huggingface, refuse_unread, resolve
from kraken_compiler.capture.export_module import export_module, training_mode_notes
from kraken_compiler.capture.live_weights import offloaded_weights, require_weights
from kraken_compiler.capture.quantized_weights import refuse_conversion
from kraken_compiler.capture.run_source import module_reference
from kraken_compiler.capture.unwrap import unwrap
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.weights.store import MemoryStore


def capture_module(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    input_specs: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    kind: str = "module",
    path: str | None = None,
    digest: Callable[[], str] | None = None,
    tokenizer: TokenizerSource | None = None,
) -> Capture:
    """Trace a module and keep its state as the weight store.

    Args:
        model: The module.
        example_inputs: Its arguments, positional (a tuple) or named (a dict).
        input_specs: The same as texts, `NAME=DTYPE[SIZES]`.
        dtype: Convert the module to this type first, in place; quantised weights keep theirs.
        kind, path, digest, tokenizer: For `Origin`, if the module was loaded from a file.

    Raises:
        UsageError: The module has no forward, the inputs do not fit, or quantised weights are of another type than
            `dtype`.
        UnsupportedModelError: The module cannot be captured.
    """
    model = unwrap(model)
    if getattr(model.forward, "__func__", None) is nn.Module.forward:
        raise UsageError(f"{type(model).__name__} has no forward: pass the module whose forward calls what is in it")
    with offloaded_weights(model):
        require_weights(model)
        if dtype is not None:
            refuse_conversion(model, dtype)
            model.to(dtype)
        example = resolve(model, example_inputs, input_specs)
        exported = export_module(model, example)
        training_notes = training_mode_notes(model, example)
    program, notes = program_of(exported, model, example)
    refuse_unread(program, model, example)
    store = MemoryStore(exported.state_dict)
    origin = Origin(
        kind=kind,
        path=path,
        model_class=class_name(model),
        digest=digest or (lambda: digest_tensors(store)),
        tokenizer=tokenizer,
    )
    frozen = frozenset(name for name, tensor in exported.state_dict.items() if not tensor.requires_grad)
    open_model = partial(module_reference, model, example, program.inputs)
    return Capture(
        program,
        store,
        origin,
        config_dict(model),
        (*notes, *training_notes),
        open_model,
        frozen,
        stop_tokens=_stop_tokens(model),
    )


def program_of(exported: ExportedProgram, model: nn.Module, example: CallExample) -> tuple[Program, tuple[str, ...]]:
    """The program of a traced module, which is called as the module is; see `build_program`."""
    return build_program(
        exported,
        parameters=_forward_parameters(model),
        defaults=_forward_defaults(model),
        implied=example.implied,
        model_class=class_name(model),
    )


def _forward_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names that `forward` accepts, in positional order; those that only a name can give come last."""
    kinds = inspect.Parameter
    named_kinds = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind in named_kinds)


def _forward_defaults(model: nn.Module) -> dict[str, bool | int | float | str | None]:
    """What `forward` takes for arguments that a call leaves out, where that is a single value."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


def class_name(model: nn.Module) -> str:
    """Qualified name of the model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def config_dict(model: nn.Module) -> dict[str, Any] | None:
    """A Hugging Face model's config as a dict, None for other modules."""
    if not is_huggingface(model):
        return None
    config: Any = model.config
    return dict(config.to_dict())


def _stop_tokens(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text of a Hugging Face model, as its own `generate` takes them; none for other modules."""
    generation: Any = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = eos_in_config(config_dict(model) or {}) if eos is None else eos
    return tuple(one for one in (eos if isinstance(eos, list) else [eos]) if type(one) is int)
