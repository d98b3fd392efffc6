"""A lane graph as JSON: calls of named operators on values, numbers and names; no objects, no code, no subgraphs.

    {"kraken_graph": 1,
     "inputs": ["p_weight", "input_ids"],
     "nodes": [
    {"name": "linear", "call": "aten.linear.default", "args": ["input_ids", "p_weight"]},
    {"name": "full", "call": "aten.full.default", "args": [[4], {"float": "-inf"}], "kwargs": {"pin_memory": false}}
     ],
     "output": ["full"]}

A string is the name of a value; null, true, numbers and lists are what they are in JSON, finite floats to the last bit.
All else is an object of one member that says what it is: `float`, `str`, `dtype`, `device`, `layout`, `memory_format`.
Sizes are values like any others. The names are ours and the operators' own, so a file does not depend on the version
of torch that wrote it; the same graph always gives the same bytes.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kraken_compiler import _torch_compat as compat
from kraken_compiler.ops import cached_attention, engine_attention
from kraken_compiler.ops import collectives as ops
from kraken_compiler.ops.structure_safety import FILE_OPS, is_value_name

VERSION = 1
_VERSION_KEY = "kraken_graph"

_OP = re.compile(r"(aten|prims|kraken)\.([A-Za-z_0-9]+)\.([A-Za-z_0-9]+)")
_FUNCTIONS: dict[str, Callable[..., Any]] = (
    {
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "lshift", "rshift", "getitem"),
        )
    }
    | compat.size_functions()
    | {"math.trunc": math.trunc}
)
"""The functions that a graph calls beside operators: arithmetic of sizes, and the elements of a result."""
_NAMES_OF_FUNCTIONS = {function: name for name, function in _FUNCTIONS.items()}

_CONSTANTS: dict[str, dict[str, Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    "dtype": {
        name: getattr(torch, name)
        for name in (
            *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
            *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
            *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        )
    },
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
    },
}
"""Kind -> name in the file -> value."""
_KINDS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
_DEVICE = re.compile(r"[a-z]{1,20}(:[0-9]{1,3})?")


class UnknownGraphError(Exception):
    """The graph holds something that no lane program holds."""


def graph_to_json(graph: fx.Graph) -> str:
    """A graph of calls as text; a line for each of its calls."""
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    calls = []
    for node in graph.nodes:
        if node.op == "call_function":
            call = {"name": node.name, "call": _call_name(node.target), "args": _to_json(node.args)}
            if node.kwargs:
                call["kwargs"] = {name: _to_json(value) for name, value in node.kwargs.items()}
            calls.append(_dump(call))
        else:
            assert node.op in ("placeholder", "output"), f"a lane graph holds calls only, found {node.format_node()}"
    lines = ",\n".join(calls)
    output = _dump(_to_json(graph.output_node().args[0]))
    head = f'{{"{_VERSION_KEY}": {VERSION},\n"inputs": {_dump(inputs)},\n"nodes": [\n'
    return f'{head}{lines}\n],\n"output": {output}}}\n'


def graph_from_json(text: str) -> fx.Graph:
    """The graph that a text describes; its nodes have no metadata.

    Raises:
        UnknownGraphError: It is of another version, calls what no lane program calls, or has an argument of unknown
            kind or a member that is not understood.
        ValueError, RecursionError: It is no JSON.
        LookupError, TypeError, AttributeError, RuntimeError: It is no graph.
    """
    assert None not in (
        ops,
        cached_attention,
        engine_attention,
    )  # importing them defines the kraken ops that the graph calls
    content = json.loads(text, parse_constant=_refuse_number)
    version = content[_VERSION_KEY]
    if version != VERSION:
        raise UnknownGraphError(f"graph schema {version!r}, this version reads {VERSION}; compile the model again")
    _require_members(content, {_VERSION_KEY, "inputs", "nodes", "output"})
    reader = _Reader()
    for name in content["inputs"]:
        reader.add(name, reader.graph.placeholder(_require_name(name)))
    for call in content["nodes"]:
        reader.call(call)
    reader.graph.output(tuple(reader.argument(value) for value in content["output"]))
    reader.graph.lint()
    return reader.graph


def _call_name(target: Any) -> str:
    return str(target) if isinstance(target, compat.OpOverload) else _NAMES_OF_FUNCTIONS[target]


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _to_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return value.name
    if value is None or type(value) in (bool, int):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"str": value}
    if isinstance(value, list | tuple):
        return [_to_json(element) for element in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    assert type(value) in _KINDS, f"no lane program has an argument like {value!r}"
    return {_KINDS[type(value)]: str(value).removeprefix("torch.")}


class _Reader:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}

    def call(self, entry: dict[str, Any]) -> None:
        _require_members(entry, {"name", "call", "args", "kwargs"})
        name = _require_name(entry["name"])
        args = tuple(self.argument(value) for value in entry["args"])
        kwargs = {_require_name(key): self.argument(value) for key, value in entry.get("kwargs", {}).items()}
        self.add(name, self.graph.create_node("call_function", _target(entry["call"]), args, kwargs, name))

    def add(self, name: str, node: fx.Node) -> None:
        # fx renames what is there already, and what would hide a name of Python's own.
        if node.name != name:
            raise UnknownGraphError(f"'{name}' is the name of something else")
        self.nodes[name] = node

    def argument(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, str):
            return self.nodes[value]
        if isinstance(value, list):
            return [self.argument(element) for element in value]
        ((kind, content),) = value.items()
        if not isinstance(content, str):
            raise UnknownGraphError(f"an argument of kind {kind!r} that is no text")
        if kind == "str":
            return content
        if kind == "device" and _DEVICE.fullmatch(content):
            return torch.device(content)
        if content not in _CONSTANTS.get(kind, ()):
            raise UnknownGraphError(f"an argument of kind {kind!r}: {content[:60]!r}")
        return _CONSTANTS[kind][content]


def _target(name: str) -> Callable[..., Any]:
    match = _OP.fullmatch(name)
    if match is not None:
        namespace, packet, overload = match.groups()
        try:
            target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        except AttributeError as error:
            raise UnknownGraphError(f"this torch has no op '{name}'") from error
        if isinstance(target, compat.OpOverload) and packet not in FILE_OPS:
            return target
    elif name in _FUNCTIONS:
        return _FUNCTIONS[name]
    raise UnknownGraphError(f"it calls '{name}', which no lane program calls")


def _require_name(name: object) -> str:
    """Return a name of the file, after making sure that it is one."""
    if not isinstance(name, str) or not is_value_name(name):
        raise UnknownGraphError(f"{str(name)[:60]!r} is no name of a value")
    return name


def _require_members(entry: dict[str, Any], members: set[str]) -> None:
    unknown_members = sorted(entry.keys() - members)
    if unknown_members:
        raise UnknownGraphError(f"unknown member {unknown_members[0][:60]!r}")


def _refuse_number(text: str) -> float:
    raise UnknownGraphError(f"{text} is no number of JSON")
