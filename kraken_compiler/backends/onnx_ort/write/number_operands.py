"""Gives sizes that are operands of tensor operators the element type that PyTorch computes with.

%y = mul(%x, %sym_size)        ->     %s = scalar_tensor(%sym_size, float32); %y = mul(%x, %s)

ONNX has tensors only, and a size is one of whole numbers: next to floating-point numbers it would be of another type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_SCALAR_TENSOR = torch.ops.aten.scalar_tensor.default


def type_number_operands(graph: fx.Graph, mode: Any) -> None:
    """Rewrite a graph in place; `mode` is that of its fake tensors."""
    for node in list(graph.nodes):
        result = node.meta.get("val")
        if node.op != "call_function" or not isinstance(result, Tensor) or not result.is_floating_point():
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for place, (parameter, operand) in enumerate(zip(schema.arguments, node.args)):
            if not isinstance(parameter.type, torch.TensorType) or not isinstance(operand, fx.Node):
                continue
            if isinstance(operand.meta.get("val"), Tensor | None):
                continue
            with graph.inserting_before(node):
                number = graph.call_function(_SCALAR_TENSOR, (operand,), {"dtype": result.dtype})
            with mode:
                number.meta["val"] = torch.empty((), dtype=result.dtype)
            number.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            node.update_arg(place, number)
