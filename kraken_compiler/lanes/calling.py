"""The calling convention: the source model's arguments to the graph's inputs, and its outputs back.

Every runtime uses these two functions, so that a rewritten model has the source model's signature everywhere.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import CallSpec, InputSpec
from kraken_compiler.ir.size_checks import require_sizes

_NO_VALUE = object()


def bind(call: CallSpec, inputs: Sequence[InputSpec], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Turn the arguments of a call of the source model into the graph's tensor inputs.

    Args:
        call: The program's calling convention.
        inputs: The program's inputs.
        args: Positional arguments.
        kwargs: Named arguments.

    Returns:
        One tensor for every element of `inputs`, in that order.

    Raises:
        UsageError: An argument is missing, unknown, was not captured, or has another structure or a size that the
            program was not compiled for.
    """
    arguments = _by_name(call, args, kwargs)
    for name in dict.fromkeys([*arguments, *call.constants]):
        if name not in call.trees:
            _check_constant(call, name, arguments.get(name, _NO_VALUE))
    by_argument = {name: _tensors_of(call, name, arguments.get(name, _NO_VALUE)) for name in call.trees}
    next_index = dict.fromkeys(call.trees, 0)
    tensors: list[Tensor] = []
    for spec in inputs:
        tensor = by_argument[spec.parameter][next_index[spec.parameter]]
        next_index[spec.parameter] += 1
        _check_shape(call, spec, tensor)
        _check_kind(call, spec, tensor)
        tensors.append(tensor)
    require_sizes(call, inputs, [tensor.shape for tensor in tensors])
    return tensors


def unflatten_output(call: CallSpec, tensors: Sequence[Tensor]) -> Any:
    """Rebuild the source model's output from the graph's flat outputs.

    Returns:
        The source model's own output structure; a dict of name -> tensor if its class cannot be imported here.
    """
    remaining = iter(tensors)
    leaves = [None if leaf in call.none_outputs else next(remaining) for leaf in range(len(call.out_names))]
    spec = _load_tree(call.out_tree)
    if spec is None:
        return {name: leaf for name, leaf in zip(call.out_names, leaves, strict=True) if leaf is not None}
    return compat.tree_unflatten(leaves, spec)


def _by_name(call: CallSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) > len(call.parameters):
        raise UsageError(f"{_model(call)} takes {len(call.parameters)} positional arguments, {len(args)} were given")
    arguments = dict(zip(call.parameters, args))
    for name, value in kwargs.items():
        if name in arguments:
            raise UsageError(f"{_model(call)} got two values for argument '{name}'")
        arguments[name] = value
    return arguments


def _check_constant(call: CallSpec, name: str, value: Any) -> None:
    """Require that an argument which is no tensor is, given or left out, what it was at capture."""
    default = call.defaults.get(name, _NO_VALUE)
    is_given = value is not _NO_VALUE
    if not is_given or (value is None and default is _NO_VALUE):
        value = default
    # Where defaults are not known, as of an archive, whoever gives nothing means what was captured.
    if value is _NO_VALUE or (name in call.implied and value is None):
        return
    if name not in call.constants and name not in call.parameters:
        raise UsageError(f"{_model(call)} has no argument '{name}'; it takes {', '.join(call.trees)}")
    captured = call.constants.get(name, default)
    if type(value) is type(captured) and value == captured:
        return
    if captured is _NO_VALUE or captured is None:
        raise UsageError(
            f"{_model(call)} was compiled without the argument '{name}', so it may only be None; to use it, compile "
            f"again with an example of it (--input {name}=DTYPE[SIZES] or example_inputs={{'{name}': ...}})"
        )
    if not is_given:
        raise UsageError(
            f"{_model(call)} was compiled with {name}={captured!r}, and a call that leaves it out means {value!r}: "
            f"give {name}={captured!r}, or compile it again without"
        )
    raise UsageError(
        f"{_model(call)} was compiled with {name}={captured!r} and cannot be called with another value; "
        f"compile it again with example_inputs that hold {name}={_brief(value)}"
    )


def _tensors_of(call: CallSpec, name: str, value: Any) -> list[Tensor]:
    if value is _NO_VALUE:
        raise UsageError(f"{_model(call)} needs the argument '{name}'; it takes {', '.join(call.trees)}")
    leaves, spec = compat.tree_flatten(value)
    captured_spec = _load_tree(call.trees[name])
    nones = call.none_inputs.get(name, ())
    matches = captured_spec is None or spec == captured_spec
    if not matches or any(isinstance(leaf, Tensor) == (index in nones) for index, leaf in enumerate(leaves)):
        raise UsageError(
            f"argument '{name}' of {_model(call)} must be {_structure_of(call, name)}, got {_brief(value)}"
        )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _check_shape(call: CallSpec, spec: InputSpec, tensor: Tensor) -> None:
    fits = tensor.dim() == len(spec.shape) and all(
        isinstance(size, str) or actual == size for actual, size in zip(tensor.shape, spec.shape)
    )
    if not fits:
        raise UsageError(
            f"argument '{spec.parameter}' of {_model(call)} must have shape [{', '.join(map(str, spec.shape))}], "
            f"got {list(tensor.shape)}"
        )


def _check_kind(call: CallSpec, spec: InputSpec, tensor: Tensor) -> None:
    """Require a flag, a whole number or a fraction as captured: models tell these apart, but not by their bits."""
    captured_dtype: torch.dtype = getattr(torch, spec.dtype)
    if _kind(tensor.dtype) != _kind(captured_dtype):
        raise UsageError(
            f"argument '{spec.parameter}' of {_model(call)} was compiled for {spec.dtype}, got "
            f"{str(tensor.dtype).removeprefix('torch.')}: its code may do something else with that; convert it"
        )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "fraction"
    return "flag" if dtype == torch.bool else "complex" if dtype.is_complex else "whole"


def _model(call: CallSpec) -> str:
    return call.model_class or "the model"


def _structure_of(call: CallSpec, name: str) -> str:
    spec = _load_tree(call.trees[name])
    if spec is None or spec.is_leaf():
        return "a tensor"
    nones = call.none_inputs.get(name, ())
    leaves = [None if leaf in nones else "tensor" for leaf in range(spec.num_leaves)]
    return f"structured as {compat.tree_unflatten(leaves, spec)!r}"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


@lru_cache(maxsize=64)
def _load_tree(text: str) -> compat.TreeSpec | None:
    """The structure, or None if one of its classes is not importable here."""
    try:
        return compat.tree_loads(text)
    except NotImplementedError:
        pass
    # Hugging Face output classes register themselves when their module is imported.
    if "transformers." not in text:
        return None
    try:
        for module in sorted(_transformers_modules(json.loads(text))):
            importlib.import_module(module)
        return compat.tree_loads(text)
    except (ImportError, NotImplementedError):
        return None


def _transformers_modules(schema: Any) -> set[str]:
    """Modules of the transformers classes in a serialized structure."""
    if isinstance(schema, list):
        return set().union(*map(_transformers_modules, schema))
    if not isinstance(schema, dict):
        return set()
    name = schema.get("type")
    modules = {name.rpartition(".")[0]} if isinstance(name, str) and name.startswith("transformers.") else set()
    return modules | _transformers_modules(schema.get("children_spec", []))
