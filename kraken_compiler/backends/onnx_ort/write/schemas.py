"""The ops of our domain as ONNX knows ops, for the exporter and the checker."""

from __future__ import annotations

from functools import cache

import onnx
from onnx.defs import OpSchema

from kraken_compiler.backends.onnx_ort.format import DEQUANTIZE, DOMAIN, DOMAIN_VERSION, GATHER, START, WAIT

_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


@cache
def register_schemas() -> None:
    """Make the ops known to `onnx`; once is enough."""
    constraint = [("T", _TYPES, "floating-point tensors")]
    optional = OpSchema.FormalParameterOption.Optional

    def parameter(
        name: str, doc: str, option: OpSchema.FormalParameterOption | None = None
    ) -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(name, "T", doc, param_option=option or OpSchema.FormalParameterOption.Single)

    onnx.defs.register_schema(
        OpSchema(
            START,
            DOMAIN,
            DOMAIN_VERSION,
            "Begins the sum of a tensor over the devices.",
            inputs=[parameter("X", "this device's part, of the same shape on all devices")],
            outputs=[parameter("Handle", "goes to AllReduceWait, once")],
            type_constraints=constraint,
        )
    )
    onnx.defs.register_schema(
        OpSchema(
            WAIT,
            DOMAIN,
            DOMAIN_VERSION,
            "The finished sum.",
            inputs=[
                parameter("Handle", "from AllReduceStart"),
                parameter("After", "what must have been computed before; its values are not used", optional),
            ],
            outputs=[parameter("Y", "the sum, with the shape of X")],
            type_constraints=constraint,
        )
    )
    onnx.defs.register_schema(
        OpSchema(
            GATHER,
            DOMAIN,
            DOMAIN_VERSION,
            "The devices' parts, one behind the other.",
            inputs=[parameter("X", "this device's part, of the same shape on all devices")],
            outputs=[parameter("Y", "as many times as long along the axis as there are devices")],
            type_constraints=constraint,
            attributes=[
                OpSchema.Attribute("axis", OpSchema.AttrType.INT, "Along which dim."),
                OpSchema.Attribute("degree", OpSchema.AttrType.INT, "Number of devices."),
            ],
        )
    )
    onnx.defs.register_schema(
        OpSchema(
            DEQUANTIZE,
            DOMAIN,
            DOMAIN_VERSION,
            "The weight that integers, their scales and zero points stand for; becomes operators of ONNX.",
            inputs=[
                OpSchema.FormalParameter("Data", "I", "the integers, packed if they are short"),
                OpSchema.FormalParameter("Scale", "S", "a row's scales"),
                OpSchema.FormalParameter("ZeroPoint", "Z", "a row's zero points", param_option=optional),
            ],
            outputs=[parameter("Y", "the weight")],
            type_constraints=[
                *constraint,
                ("I", ["tensor(int8)"], "integers"),
                ("S", _TYPES, "floating-point tensors"),
                ("Z", [*_TYPES, "tensor(int8)"], "any numbers"),
            ],
            attributes=[
                OpSchema.Attribute("bits", OpSchema.AttrType.INT, "Of an integer."),
                OpSchema.Attribute("dtype", OpSchema.AttrType.INT, "Of the weight."),
            ],
        )
    )
