"""Weights that are integers with scales, in ONNX's own terms: they stay integers in the file and in the session.

    kraken::Dequantize(data, scale)               ->  DequantizeLinear(data, scale)
    kraken::Dequantize(data, scale, zero_point)   ->  the same, less zero_point * scale

Two integers of a byte become ONNX's INT4, which has the same bytes. Zero points come after the product with the scale,
because theirs are of the integers' type in ONNX, and ours may be fractions.
"""

from __future__ import annotations

import onnx_ir

from kraken_compiler.backends.onnx_ort.format import DEQUANTIZE, DOMAIN


def dequantize_weights(model: onnx_ir.Model) -> None:
    """Replace all nodes of the kind; the integers must be inputs of the graph."""
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == DEQUANTIZE:
            _replace(model.graph, node)


def _replace(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    data, scale, *rest = node.inputs
    assert data is not None
    assert scale is not None
    assert scale.shape is not None
    zero_point = rest[0] if rest else None
    rows, groups = scale.shape.numpy()
    columns = _as_integers(data, node.attributes["bits"].as_int())
    size, dtype = columns // groups, onnx_ir.DataType(node.attributes["dtype"].as_int())
    writer = _Writer(graph, node, scale)
    if groups == 1:
        # Where a row has one scale, scales are a vector.
        scales = writer.call("Reshape", (rows,), scale, writer.integers(rows))
        weight = writer.call("DequantizeLinear", (rows, columns), data, scales, axis=0)
    else:
        weight = writer.call("DequantizeLinear", (rows, columns), data, scale, axis=1, block_size=size)
    if zero_point is not None:
        shift = writer.call("Mul", (rows, groups), writer.call("CastLike", (rows, groups), zero_point, scale), scale)
        shift = writer.call("Reshape", (rows, groups, 1), shift, writer.integers(rows, groups, 1))
        blocks = writer.call("Reshape", (rows, groups, size), weight, writer.integers(rows, groups, size))
        blocks = writer.call("Sub", (rows, groups, size), blocks, shift)
        weight = writer.call("Reshape", (rows, columns), blocks, writer.integers(rows, columns))
    if scale.dtype != dtype:
        weight = writer.call("Cast", (rows, columns), weight, to=dtype.value)
        weight.type = onnx_ir.TensorType(dtype)
    old = node.outputs[0]
    old.replace_all_uses_with(weight)
    graph.remove(node, safe=True)
    weight.name = old.name


def _as_integers(data: onnx_ir.Value, bits: int) -> int:
    """Give a weight's integers their own type, however many share a byte; returns their number in a row."""
    assert data.shape is not None
    rows, width = data.shape.numpy()
    if bits == 8 or data.dtype == onnx_ir.DataType.INT4:
        return int(width)
    data.type, data.shape = onnx_ir.TensorType(onnx_ir.DataType.INT4), onnx_ir.Shape((rows, width * 8 // bits))
    return int(width * 8 // bits)


class _Writer:
    """Writes nodes before a node, whose results are of the scales' type."""

    def __init__(self, graph: onnx_ir.Graph, place: onnx_ir.Node, scale: onnx_ir.Value) -> None:
        self._graph, self._place, self._type = graph, place, scale.type

    def call(self, op_type: str, shape: tuple[int, ...], *inputs: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        """A call of an operator; returns its result, of this shape."""
        settings = [onnx_ir.AttrInt64(name, value) for name, value in attributes.items()]
        result = self._insert(onnx_ir.Node("", op_type, inputs, settings))
        result.type, result.shape = self._type, onnx_ir.Shape(shape)
        return result

    def integers(self, *values: int) -> onnx_ir.Value:
        """A constant."""
        tensor = onnx_ir.tensor(list(values), dtype=onnx_ir.DataType.INT64)
        result = self._insert(onnx_ir.Node("", "Constant", (), [onnx_ir.AttrTensor("value", tensor)]))
        result.type, result.shape = onnx_ir.TensorType(onnx_ir.DataType.INT64), onnx_ir.Shape((len(values),))
        return result

    def _insert(self, node: onnx_ir.Node) -> onnx_ir.Value:
        node.metadata_props.update(self._place.metadata_props)
        self._graph.insert_before(self._place, node)
        return node.outputs[0]
