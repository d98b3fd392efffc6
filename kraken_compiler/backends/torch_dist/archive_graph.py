"""Reads the graph of a `torch.export` archive from its JSON (schema major 8, torch 2.11 to 2.13).

Only calls of named ops on tensors, numbers and names: no subgraphs, no objects, no code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kraken_compiler.ir import cached_attention, ops
from kraken_compiler.structure_safety import FILE_OPS, is_value_name

SCHEMA_MAJOR = 8

_OP = re.compile(r"torch\.ops\.(aten|prims|kraken)\.([A-Za-z_0-9]+)\.([A-Za-z_0-9]+)")
_SCALAR_OPS: dict[str, Callable[..., Any]] = (
    {
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "lshift", "rshift"),
        )
    }
    | {
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "_sym_sqrt")
        if hasattr(torch, name)
    }
    | {"math.trunc": math.trunc}
)

_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16, 28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz, 32: torch.float8_e5m2fnuz, 33: torch.float8_e8m0fnu, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_LAYOUTS = {7: torch.strided}
_KEYWORD = 2


class UnknownGraphError(Exception):
    """The graph holds something that no lane program holds."""


def graph_from_json(content: dict[str, Any]) -> fx.Graph:
    """Build the graph.

    Raises:
        UnknownGraphError: It calls something outside the allowed namespaces, or has an argument of unknown kind.
        KeyError, IndexError, TypeError: The content is no graph.
    """
    assert None not in (ops, cached_attention)  # importing them defines the kraken ops that the graph calls
    reader = _Reader()
    for entry in content["inputs"]:
        name = _checked(entry["as_tensor"]["name"])
        reader.nodes[name] = reader.graph.placeholder(name)
    for entry in content["nodes"]:
        reader.call(entry)
    reader.graph.output(tuple(reader.argument(entry) for entry in content["outputs"]))
    reader.drop_unused_elements()
    reader.graph.lint()
    return reader.graph


class _Reader:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}

    def call(self, entry: dict[str, Any]) -> None:
        target = _target(entry["target"])
        args, kwargs = [], {}
        for argument in entry["inputs"]:
            value = self.argument(argument["arg"])
            if argument.get("kind") == _KEYWORD:
                kwargs[_checked(argument["name"])] = value
            else:
                args.append(value)
        outputs = [_output_names(output) for output in entry["outputs"]]
        first = outputs[0] if len(outputs) == 1 else outputs
        if isinstance(first, str):
            self.nodes[first] = self.graph.create_node("call_function", target, tuple(args), kwargs, first)
            return
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, _name_of(entry))
        for position, name in enumerate(first or ()):
            if isinstance(name, str):
                self.nodes[name] = self.graph.create_node(
                    "call_function", operator.getitem, (node, position), name=name
                )

    def argument(self, entry: dict[str, Any]) -> Any:
        (kind, value), *rest = entry.items()
        if rest:
            raise UnknownGraphError(f"an argument has several kinds: {sorted(entry)}")
        if kind == "as_none":
            return None
        if kind in ("as_tensor", "as_optional_tensor"):
            return self.nodes[value["name"]] if "name" in value else self.argument(value)
        if kind in ("as_int", "as_bool", "as_string", "as_ints", "as_bools", "as_strings"):
            return value
        if kind == "as_float":
            return float(value)  # infinities and NaN are written as words
        if kind == "as_floats":
            return [float(element) for element in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._scalar(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._scalar(element) for element in value]
        if kind == "as_tensors":
            return [self.nodes[element["name"]] for element in value]
        if kind == "as_optional_tensors":
            return [self.argument(element) for element in value]
        if kind == "as_scalar_type":
            return _DTYPES[value]
        if kind == "as_memory_format":
            return _MEMORY_FORMATS[value]
        if kind == "as_layout":
            return _LAYOUTS[value]
        if kind == "as_device":
            return (
                torch.device(value["type"], value["index"])
                if value["index"] is not None
                else torch.device(value["type"])
            )
        raise UnknownGraphError(f"an argument of kind '{kind}'")

    def _scalar(self, entry: dict[str, Any]) -> Any:
        if "as_name" in entry:
            return self.nodes[entry["as_name"]]
        ((_, value),) = entry.items()
        return value

    def drop_unused_elements(self) -> None:
        """The file names every element of a result, also those that nothing reads."""
        for node in reversed(list(self.graph.nodes)):
            if node.target is operator.getitem and not node.users:
                self.graph.erase_node(node)


def _target(name: str) -> Callable[..., Any]:
    match = _OP.fullmatch(name)
    if match is not None:
        namespace, packet, overload = match.groups()
        try:
            target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        except AttributeError as error:
            raise UnknownGraphError(f"this torch has no op '{name}'") from error
        if isinstance(target, torch._ops.OpOverload) and packet not in FILE_OPS:
            return target
    elif name in _SCALAR_OPS:
        return _SCALAR_OPS[name]
    raise UnknownGraphError(f"it calls '{name}', which no lane program calls")


def _checked(name: object) -> str:
    """A name of the file, after making sure that it is one."""
    if not isinstance(name, str) or not is_value_name(name):
        raise UnknownGraphError(f"{str(name)[:60]!r} is no name of a value")
    return name


def _name_of(entry: dict[str, Any]) -> str | None:
    name = entry.get("name")
    return None if name is None else _checked(name)


def _output_names(entry: dict[str, Any]) -> str | list[str] | None:
    """Name of one result, names of a list of results, or None for a result that is no tensor and not kept."""
    if "as_tensor" in entry:
        return _checked(entry["as_tensor"]["name"])
    for kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        if kind in entry:
            return _checked(entry[kind]["as_name"])
    if "as_tensors" in entry:
        return [_checked(element["name"]) for element in entry["as_tensors"]]
    if "as_none" in entry:
        return None
    raise UnknownGraphError(f"a result of kind {sorted(entry)}")
