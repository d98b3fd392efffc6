"""Sizes of values from names: `batch` and `sequence` are known when a program is called."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable, Mapping
from functools import cache

import onnx

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def bind_sizes(inputs: Iterable[onnx.ValueInfoProto], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of the named dims of the inputs.

    Raises:
        ValueError: A shape does not fit; says which.
    """
    sizes: dict[str, int] = {}
    for value in inputs:
        dims, shape = value.type.tensor_type.shape.dim, shapes[value.name]
        fits = len(dims) == len(shape)
        for dim, size in zip(dims, shape):
            fits = fits and (sizes.setdefault(dim.dim_param, size) if dim.dim_param else dim.dim_value) == size
        if not fits:
            expected_shape = [dim.dim_param or dim.dim_value for dim in dims]
            raise ValueError(f"input '{value.name}' is {list(shape)}, expected {expected_shape} with {sizes}")
    return sizes


def shape_of(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of a value; None if it does not follow from the inputs' sizes."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    shape = []
    for dim in value.type.tensor_type.shape.dim:
        size = dim.dim_value if dim.HasField("dim_value") else _evaluate(_parse(dim.dim_param), sizes)
        if size is None:
            return None
        shape.append(size)
    return tuple(shape)


@cache
def _parse(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return None


def _evaluate(expression: ast.expr | None, sizes: Mapping[str, int]) -> int | None:
    """The value of a sum or product of names and whole numbers; None if it is anything else."""
    if isinstance(expression, ast.Name):
        return sizes.get(expression.id)
    if isinstance(expression, ast.Constant) and isinstance(expression.value, int):
        return expression.value
    if isinstance(expression, ast.BinOp) and type(expression.op) in _OPERATIONS:
        left, right = _evaluate(expression.left, sizes), _evaluate(expression.right, sizes)
        if left is None or right is None or (isinstance(expression.op, ast.FloorDiv) and right == 0):
            return None
        return int(_OPERATIONS[type(expression.op)](left, right))
    return None
