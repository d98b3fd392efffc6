"""Programs as text: for `--dump-graphs`, for golden tests, for people."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler._torch_compat import OpOverload
from kraken_compiler.ir.program import Program

_SHORT_DTYPE = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "bool": "b8"}


def program_text(program: Program) -> str:
    """The graph, one node a line, with shapes; weights that a lane holds only in part show which part."""
    lines = [f"program degree={program.degree} inputs={[spec.name for spec in program.inputs]}"]
    lines += [_line(node, program) for node in program.graph.nodes]
    return "\n".join(lines) + "\n"


def _line(node: fx.Node, program: Program) -> str:
    if node.op == "placeholder":
        spec = program.weights.get(node.name)
        if spec is None:
            return f"%{node.name}: {_type(node)} = input"
        split = "".join(f" split(dim {shard.dim})" for shard in spec.shards)
        scale = f" scale {spec.scale:g}" if spec.scale != 1.0 else ""
        return f"%{node.name}: {_type(node)} = {spec.kind} {spec.source}{split}{scale}"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"%{node.name}: {_type(node)} = {_target(node)}({', '.join(arguments)})"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_argument(element) for element in argument)}]"
    return str(argument)


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{_SHORT_DTYPE.get(name, name)}[{', '.join(str(size) for size in value.shape)}]"
    return "int" if isinstance(value, (int, torch.SymInt)) else "?"
