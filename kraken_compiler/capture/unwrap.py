"""The module that computes, inside wrappers that pass every call on; the message for what is no module at all.

A wrapper is taken off only where a call of it is a call of the module inside, word for word; every other module around
a model is traced as the function that it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler.errors import Rejection, UnsupportedModelError

_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
}
"""Wrapper classes whose `forward` is the call of one submodule, and that submodule's name."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers that pass every call on; the model itself if it is none.

    Raises:
        UnsupportedModelError: A wrapper computes in another precision than the module inside.
    """
    while (inner := _inner_module(model)) is not None:
        model = inner
    return model


def is_a(value: object, module: str, name: str) -> bool:
    """True if a value is of a class, told by its name so that the class's module need not be imported.

    Args:
        value: Anything.
        module: The class's module, or a package above it.
        name: The class's name.
    """
    return any(
        cls.__name__ == name and (cls.__module__ == module or cls.__module__.startswith(f"{module}."))
        for cls in type(value).__mro__
    )


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Turn caches off inside: Hugging Face models, also in other modules, return one only if asked for it."""
    models: list[Any] = [module for module in model.modules() if is_a(module, "transformers", "PreTrainedModel")]
    configs = {id(inner.config): inner.config for inner in models}
    settings = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, use_cache in settings:
            if use_cache is not None:
                config.use_cache = False
        yield
    finally:
        for config, use_cache in settings:
            config.use_cache = use_cache


def what_to_pass(source: object) -> str:
    """The message about a source that is neither a module nor a path, with what to pass instead."""
    expected = f"a model must be an nn.Module or a path, got {_kind_text(source)}"
    if isinstance(source, type):
        instance = f"pass an instance of {source.__name__}, with its weights loaded"
        return f"{expected}: {instance}" if issubclass(source, nn.Module) else expected
    if isinstance(source, Mapping) and any(isinstance(value, Tensor) for value in source.values()):
        return f"{expected} of weights: build the model, load them with load_state_dict, and pass the model"
    owner = _owner(source)
    if owner is not None:
        return f"{expected} of a {type(owner).__name__}: pass the module itself"
    attributes = [name for name in ("model", "module") if isinstance(getattr(source, name, None), nn.Module)]
    if attributes:
        return f"{expected}: pass its .{attributes[0]}"
    if inspect.isroutine(source) or isinstance(source, functools.partial | torch.jit.ScriptFunction):
        return f"{expected}: pass the module that it calls, or an nn.Module whose forward does what it does"
    return expected


def _inner_module(model: nn.Module) -> nn.Module | None:
    for (module, name), attribute in _WRAPPERS.items():
        wrapper_class: Any = next(
            (cls for cls in type(model).__mro__ if (cls.__module__, cls.__name__) == (module, name)), None
        )
        if wrapper_class is None or type(model).forward is not wrapper_class.forward or _has_hooks(model):
            continue
        if getattr(model, "mixed_precision", None) is not None:
            raise UnsupportedModelError(
                [Rejection(_MIXED_PRECISION.format(name), path=name, hint=f"Pass its .{attribute}.")]
            )
        inner = getattr(model, attribute)
        assert isinstance(inner, nn.Module)
        return inner
    return None


_MIXED_PRECISION = "{} with mixed_precision computes in another element type than the module inside"


def _has_hooks(model: nn.Module) -> bool:
    return bool(model._forward_hooks or model._forward_pre_hooks)


def _kind_text(source: object) -> str:
    if isinstance(source, type):
        return f"the class {source.__name__}"
    return f"a {type(source).__name__}"


def _owner(source: Any) -> nn.Module | None:
    """The module whose method something is."""
    if isinstance(source, functools.partial):
        source = source.func
    owner = getattr(source, "__self__", source)
    return owner if isinstance(owner, nn.Module) else None
