"""Which outputs of a device's model are the same on all devices to the last bit, whatever machines these are."""

from __future__ import annotations

import onnx

from kraken_compiler.backends.onnx_ort.format import DOMAIN, GATHER

_MOVES = ("Identity", "Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""Operators whose result holds numbers of their first operand and no others."""

_WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
"""What floats can be cast to without a change of their value; float64 is rounded to float32 everywhere alike."""


def is_gathered(graph: onnx.GraphProto, output: str) -> bool:
    """True if an output is what the devices have gathered, as a whole or in part.

    An all-gather hands every device's part to all as it is; see `torch_dist/run/gathered_outputs.py`.

    Args:
        graph: A device's model, with our collectives.
        output: The output's name.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for name, node in makers.items() if node.op_type == "Constant"}
    node = makers.get(output)
    while node is not None and _keeps_numbers(node, constants):
        node = makers.get(node.input[0])
    return node is not None and (node.domain, node.op_type) == (DOMAIN, GATHER)


def _keeps_numbers(node: onnx.NodeProto, constants: set[str]) -> bool:
    if node.domain or not node.input:
        return False
    if node.op_type == "Cast":
        return any(attribute.name == "to" and attribute.i in _WIDE for attribute in node.attribute)
    return node.op_type in _MOVES and constants.issuperset(filter(None, node.input[1:]))
