"""Module to `ExportedProgram`: `torch.export` in evaluation mode, without cache, free of in-place ops."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from kraken_compiler import _torch_compat as compat
from kraken_compiler.capture.example_inputs import CallExample
from kraken_compiler.capture.quantized_weights import with_plain_weights
from kraken_compiler.capture.quiet import quiet_torch
from kraken_compiler.capture.training_mode import EVALUATION, in_evaluation, module_path, training_only_notes
from kraken_compiler.capture.untouched import untouched
from kraken_compiler.capture.untraceable import why_untraceable
from kraken_compiler.capture.unwrap import without_caches
from kraken_compiler.errors import Rejection, UnsupportedModelError

_CACHE_RETURNED = re.compile(r"Found <class '(?:\w+\.)*(\w+)'> in output, which is not a known type")
_RETURN_TENSORS = (
    "Return tensors only; where it calls a Hugging Face model, with use_cache=False or without use_cache, the cache is "
    "left out."
)


def export_module(model: nn.Module, example: CallExample, *, allow_strict: bool = True) -> ExportedProgram:
    """Trace a module; all that it holds is as before afterwards, its tensors are shared, not copied.

    Args:
        model: The module; its parameters may be fake tensors.
        example: The call to trace.
        allow_strict: Try the bytecode tracer when the direct one fails (it cannot see fake parameters).

    Raises:
        UnsupportedModelError: No tracer can follow the model's code, or its weights are tensors of a kind that lanes
            cannot share.
    """
    model = with_plain_weights(model)
    with untouched(model), _capture_state(model), _no_garbage_collection():
        exported = _trace(model, example, allow_strict=allow_strict)
        compat.note_guards(exported, compat.traced_guards(exported))
        return functionalize(exported)


def training_mode_notes(model: nn.Module, example: CallExample) -> tuple[str, ...]:
    """Notes about what a module in training mode does that evaluation mode leaves out; none for any other module."""
    if not model.training:
        return ()
    model = with_plain_weights(model)
    with untouched(model), _capture_state(model, evaluation=False), quiet_torch(), example.spelled_out(model):
        try:
            with compat.no_partial_graphs():
                exported = torch.export.export(model, example.args, example.kwargs)
        except Exception as error:
            # In training a model may do what nothing can trace, e.g. skip layers at random.
            return (f"{EVALUATION}: its dropout is left out ({_summary(error)})",)
    return training_only_notes(_graphs(exported.graph_module))


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """Remove in-place ops; the noted guards stay noted.

    Re-tracing takes as long as tracing, so it only happens where an op really writes; `detach_` on a lifted constant,
    which every `torch.tensor(...)` in a forward leaves behind, is renamed instead.
    """
    for graph in _graphs(exported.graph_module):
        for node in graph.nodes:
            if node.target is torch.ops.aten.detach_.default:
                node.target = torch.ops.aten.detach.default
    _refuse_written_constants(exported)
    if any(compat.is_mutating(node) for graph in _graphs(exported.graph_module) for node in graph.nodes):
        noted_guards, earlier_guards = compat.noted_guards(exported), compat.guards_of(exported)
        with quiet_torch():
            try:
                functional: ExportedProgram = exported.run_decompositions({})
            except RuntimeError as error:
                reason = f"torch.export cannot take its in-place writes out: {_summary(error)}"
                raise UnsupportedModelError([Rejection(reason)]) from error
        new_guards = [guard for guard in compat.traced_guards(functional) if guard not in earlier_guards]
        compat.note_guards(functional, (*noted_guards, *new_guards))
        return functional
    exported.graph_module.recompile()
    return exported


def _refuse_written_constants(exported: ExportedProgram) -> None:
    """Refuse writes to tensors that are neither parameters nor buffers; taking them out ends in a crash of torch."""
    constants = exported.graph_signature.inputs_to_lifted_tensor_constants
    for node in exported.graph.nodes:
        for operand in compat.written_operands(node):
            name = constants.get(compat.viewed(operand).name)
            if name is not None:
                reason = f"its forward writes to {_written_tensor(name)}, and a program keeps nothing between calls"
                hint = "Return what is to be kept, or write to a copy."
                raise UnsupportedModelError([Rejection(reason, (node.name,), module_path(node), hint)])


def _written_tensor(name: str) -> str:
    # torch makes up a name for what it does not find again in the module.
    return "a tensor of its own" if "lifted_tensor" in name else f"the tensor '{name}'"


def _trace(model: nn.Module, example: CallExample, *, allow_strict: bool) -> ExportedProgram:
    failures: list[str] = []
    for strict in (False, True) if allow_strict else (False,):
        try:
            lean = nullcontext() if strict else compat.lean_traces()
            with quiet_torch(), compat.no_partial_graphs(), lean, example.spelled_out(model) as dims:
                return torch.export.export(model, example.args, example.kwargs, dynamic_shapes=dims, strict=strict)
        except Exception as error:
            # torch.export passes on whatever the model's own code raises, so there is no narrower class to name.
            rejection = why_untraceable(model, error)
            if rejection is not None:
                raise UnsupportedModelError([rejection]) from error
            failures.append(_summary(error))
    cache_match = _CACHE_RETURNED.search(failures[0])
    if cache_match is not None:
        reason = f"its forward returns a {cache_match[1]}, and only tensors and None can be returned"
        raise UnsupportedModelError([Rejection(reason, path=type(model).__name__, hint=_RETURN_TENSORS)])
    reason = f"torch.export cannot trace it: {failures[0]}"
    if len(failures) > 1 and failures[1] != failures[0]:
        reason += f" (strict mode: {failures[1]})"
    raise UnsupportedModelError(
        [
            Rejection(
                reason,
                path=type(model).__name__,
                hint="Check that torch.export.export(model, ...) works; its error says what to change.",
            )
        ]
    )


def _summary(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextmanager
def _capture_state(model: nn.Module, *, evaluation: bool = True) -> Iterator[None]:
    """Evaluation mode and no cache inside, everything as it was afterwards."""
    experts = _experts_implementations(model)
    try:
        for config, _ in experts:
            config._experts_implementation = "batched_mm"
        with without_caches(model), in_evaluation(model) if evaluation else nullcontext():
            yield
    finally:
        for config, implementation in experts:
            config._experts_implementation = implementation


def _experts_implementations(model: nn.Module) -> list[tuple[Any, Any]]:
    """The configs by which transformers' modules choose how to compute experts, and what they say.

    Of its ways only one can be traced for any number of tokens, in any element type, without ops of its own.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [
        (config, config._experts_implementation)
        for config in configs.values()
        if hasattr(config, "_experts_implementation")
    ]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing only builds up objects that live on; walking them again and again takes a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph and those of its regions."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield part.graph
