"""Lets a device's graph take weights as the lane files hold them, so that no weight is stored for ONNX alone.

    MatMul(x, weight_stored_transposed)            ->  MatMul(x, Transpose(weight))
    Gemm(x, weight_stored_transposed)              ->  Gemm(x, weight, transB=1)
    MatMul(x, table that is a weight transposed)   ->  MatMul(x, weight), or the first of these

A node of its own stands before each product, in the product's stage. Our runtime multiplies with the weight as it is
(`cut_model.cut`); any other transposes it once, when it opens the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir

from kraken_compiler.backends.onnx_ort.write.export_graph import ExportedGraph

_RIGHT_OPERAND = 1


def use_lane_layout(exported: ExportedGraph, transposes: Mapping[str, str]) -> ExportedGraph:
    """Let all weights be as the lane files hold them; what is computed or quantized stays as it is to be stored.

    Args:
        exported: The graph; written to.
        transposes: Tables that are weights transposed, and which, see `tables.transposed_weights`.

    Returns:
        The same with the weights that are then read, by their names in the weight table.
    """
    graph = exported.model.graph
    sources, aliases = set(exported.sources), {*transposes} & {*exported.tables} - {*exported.quantized}
    weights = {name: value for name, value in exported.weights.items() if name not in aliases}
    for name, initializer in exported.weights.items():
        if name not in sources | aliases or name in exported.quantized:
            continue
        flipped = (name in exported.transposed) != (name in aliases)
        origin = transposes[name] if name in aliases else name
        if not flipped and origin == name:
            continue
        if origin == name or origin not in weights:
            assert initializer.shape is not None
            shape = initializer.shape.numpy()
            lane_shape = onnx_ir.Shape(shape[::-1] if flipped else shape)
            weights[origin] = onnx_ir.Value(name=origin, type=initializer.type, shape=lane_shape)
        _replace(graph, initializer, weights[origin], flipped)
    transposed = frozenset(name for name in exported.transposed if name in exported.quantized or name not in sources)
    return replace(exported, weights=weights, transposed=transposed - aliases, tables=exported.tables - aliases)


def _replace(graph: onnx_ir.Graph, initializer: onnx_ir.Value, weight: onnx_ir.Value, flipped: bool) -> None:
    if not flipped:
        initializer.replace_all_uses_with(weight)
        return
    for use in list(initializer.uses()):
        if use.node.op_type == "Gemm" and use.idx == _RIGHT_OPERAND:
            attribute = use.node.attributes.get("transB")
            is_transposed = attribute is None or not attribute.as_int()
            use.node.attributes["transB"] = onnx_ir.AttrInt64("transB", int(is_transposed))
            use.node.replace_input_with(use.idx, weight)
            continue
        node = onnx_ir.Node("", "Transpose", [weight], [onnx_ir.AttrInt64s("perm", [1, 0])])
        node.name = f"{use.node.name}/{weight.name}"
        result = node.outputs[0]
        result.name, result.type, result.shape = f"{node.name}_transposed", initializer.type, initializer.shape
        use.node.graph.insert_before(use.node, node)  # type: ignore[union-attr]
        use.node.replace_input_with(use.idx, result)
