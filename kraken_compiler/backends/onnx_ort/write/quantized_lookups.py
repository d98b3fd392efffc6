"""Lookups in a weight that products have quantized, which is rounded for both alike.

    Gather(weight [N, K], ids)   ->   differences = Gather(integers, ids) - Gather(zero_points, ids)
                                      Slice(Reshape(differences * Gather(scales, ids)))

Legend: N rows, K columns of a row, C blocks of a row, S columns of a block; `quantization.py` has them transposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir


def is_lookup(node: onnx_ir.Node, weight: onnx_ir.Value) -> bool:
    """True if a node takes rows of the weight, and does nothing else with it."""
    axis = node.attributes.get("axis")
    places = [place for place, value in enumerate(node.inputs) if value is weight]
    return node.op_type == "Gather" and places == [0] and (axis is None or axis.as_int() == 0)


def look_up_quantized(lookup: onnx_ir.Node, parts: Sequence[onnx_ir.Value], columns: int) -> None:
    """Let a lookup take rows of the parts and compute the weight's.

    Args:
        lookup: See `is_lookup`; it is replaced.
        parts: Integers of 8 bits [N, C, S], scales [N, C], zero points [N, C].
        columns: K; the last block of a row may have more.
    """
    writer = _Writer(lookup)
    ids, result = lookup.inputs[1], lookup.outputs[0]
    assert ids is not None
    assert result.shape is not None
    integers, scales, zero_points = (writer.call("Gather", part, ids) for part in parts)
    last = writer.integers(-1)
    differences = writer.call(
        "Sub",
        writer.call("CastLike", integers, scales),
        writer.call("Unsqueeze", writer.call("CastLike", zero_points, scales), last),
    )
    blocks = writer.call("Mul", differences, writer.call("Unsqueeze", scales, last))
    same_dims = [0] * (result.shape.rank() - 1)
    padded = writer.call("Reshape", blocks, writer.integers(*same_dims, -1))
    rows = writer.call("Slice", padded, writer.integers(0), writer.integers(columns), last)
    rows.type, rows.shape = result.type, result.shape
    result.replace_all_uses_with(rows)
    name = result.name
    writer.graph.remove(lookup, safe=True)
    rows.name = name


class _Writer:
    """Writes nodes before a node."""

    def __init__(self, place: onnx_ir.Node) -> None:
        graph = place.graph
        assert isinstance(graph, onnx_ir.Graph)
        self.graph, self._place, self._count = graph, place, 0

    def call(self, op_type: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
        """A call of an operator; returns its result."""
        return self._insert(onnx_ir.Node("", op_type, inputs))

    def integers(self, *values: int) -> onnx_ir.Value:
        """A constant."""
        tensor = onnx_ir.tensor(list(values), dtype=onnx_ir.DataType.INT64)
        return self._insert(onnx_ir.Node("", "Constant", (), [onnx_ir.AttrTensor("value", tensor)]))

    def _insert(self, node: onnx_ir.Node) -> onnx_ir.Value:
        self._count += 1
        node.name = f"{self._place.name}/{node.op_type}_{self._count}"
        node.outputs[0].name = f"{node.name}_value"
        self.graph.insert_before(self._place, node)
        return node.outputs[0]
