"""Collectives as ONNX Runtime builds with NCCL have them: `com.microsoft::AllReduce` and `AllGather`.

They are synchronous for the graph; such a build overlaps them with compute on streams of its own, if it does. Stock
wheels do not have them, so what is written here can only be checked against the ops' schemas.
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx_ir
from onnx.defs import OpSchema

from kraken_compiler.backends.onnx_ort.format import (
    DOMAIN,
    GATHER,
    NCCL_DOMAIN,
    NCCL_GATHER,
    NCCL_REDUCE,
    NCCL_VERSION,
    START,
    WAIT,
)

_TYPES = ["tensor(float)", "tensor(float16)", "tensor(double)"]


def use_nccl(model: onnx_ir.Model) -> None:
    """Replace the collectives of our domain. A sum stands where it was begun; its wait goes."""
    graph = model.graph
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == WAIT:
            handle, result = node.inputs[0], node.outputs[0]
            assert handle is not None
            result.replace_all_uses_with(handle, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            continue
        attributes = []
        if node.op_type == GATHER:
            axis, degree = node.attributes["axis"].as_int(), node.attributes["degree"].as_int()
            attributes = [onnx_ir.AttrInt64("axis", axis), onnx_ir.AttrInt64("group_size", degree)]
        assert node.op_type in (START, GATHER), node.op_type
        node.domain, node.op_type = NCCL_DOMAIN, NCCL_REDUCE if node.op_type == START else NCCL_GATHER
        node.attributes.clear()
        node.attributes.update({attribute.name: attribute for attribute in attributes})
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[NCCL_DOMAIN] = NCCL_VERSION


@cache
def register_nccl_schemas() -> None:
    """Make the two ops known to `onnx`, as ONNX Runtime's sources declare them; once is enough."""
    several = OpSchema.FormalParameterOption.Variadic
    for name, attributes in ((NCCL_REDUCE, ()), (NCCL_GATHER, (("axis", 1), ("group_size", 1)))):
        onnx.defs.register_schema(
            OpSchema(
                name,
                NCCL_DOMAIN,
                NCCL_VERSION,
                inputs=[OpSchema.FormalParameter("input", "T", param_option=several)],
                outputs=[OpSchema.FormalParameter("output", "T", param_option=several)],
                type_constraints=[("T", _TYPES, "")],
                attributes=[
                    OpSchema.Attribute(attribute, onnx.helper.make_attribute(attribute, default), "")
                    for attribute, default in attributes
                ],
            )
        )
