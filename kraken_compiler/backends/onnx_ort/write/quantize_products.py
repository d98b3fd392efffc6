"""Replaces products with weights by products with quantized weights.

    MatMul(x, weight [K, N])     ->  MatMulNBits(x, weight_Q4, weight_scales, weight_zero_points)
    Gemm(x, weight [K, N], bias) ->  the same, with the bias; also of a weight [N, K] and transB

A weight that anything else reads too (an embedding that is also the head), and what is no right operand of a product
(embeddings, norms, biases, tables) stay as they are. The last product, a language model's head, has 8 bits in any case:
nothing comes after it that could even its errors out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir

from kraken_compiler.backends.onnx_ort.format import (
    MICROSOFT_DOMAIN,
    MICROSOFT_VERSION,
    NODE_TRANSPOSED,
    NODE_WEIGHT,
    PRODUCT_ACCURACY,
    QUANTIZED_PRODUCT,
)
from kraken_compiler.backends.onnx_ort.write.export_graph import ExportedGraph
from kraken_compiler.backends.onnx_ort.write.quantization import QUANTIZATIONS, Quantization

INT8_ACTIVATIONS = 4
"""Of `PRODUCT_ACCURACY`: the other operand is rounded to 8 bits too, in blocks. Others have no fast 8-bit kernels."""
_RIGHT_OPERAND = 1


def quantize_products(exported: ExportedGraph, kind: str, transposes: Mapping[str, str]) -> ExportedGraph:
    """Replace products with weights by products with quantized weights.

    Args:
        exported: The graph; written to.
        kind: A key of `QUANTIZATIONS`.
        transposes: Tables that are weights transposed, and which, see `tables.transposed_weights`.

    Returns:
        The same with the weights that are then to be stored.
    """
    weights = dict(exported.weights)
    transposed = set(exported.transposed)
    quantized: dict[str, Quantization] = {}
    origins = Counter(transposes.get(name, name) for name in exported.weights)
    last = next((node for node in reversed(exported.model.graph) if node.op_type in _PRODUCTS), None)
    for name, value in exported.weights.items():
        products = [use.node for use in value.uses()]
        is_computed = name in exported.tables and name not in transposes
        origin = transposes.get(name, name)
        if is_computed or origins[origin] > 1 or not products or not all(_is_product(node, value) for node in products):
            continue
        flips = {_is_flipped(node) for node in products}
        if len(flips) > 1:
            continue
        assert value.shape is not None
        rows, columns = value.shape.numpy()
        if flips == {True}:
            rows, columns = columns, rows
            transposed ^= {name}
        del weights[name]
        quantization = quantized[name] = QUANTIZATIONS["int8" if last in products else kind]
        parts = _parts(quantization, name, value, rows, columns)
        weights.update({str(part.name): part for part in parts})
        notes = {
            NODE_WEIGHT: origin,
            NODE_TRANSPOSED: str((name in transposed) != (name in transposes)),
        }
        for node in products:
            _replace(node, parts, quantization, rows, columns)
            node.metadata_props.update(notes)
    if quantized:
        exported.model.opset_imports[MICROSOFT_DOMAIN] = MICROSOFT_VERSION
    return replace(exported, weights=weights, transposed=frozenset(transposed), quantized=quantized)


def _is_product(node: onnx_ir.Node, weight: onnx_ir.Value) -> bool:
    """True if the node multiplies by the weight, and does nothing else with it."""
    if [place for place, value in enumerate(node.inputs) if value is weight] != [_RIGHT_OPERAND]:
        return False
    if weight.shape is None or weight.shape.rank() != 2:
        return False
    if node.op_type not in _PRODUCTS:
        return False
    plain = all(_setting(node, name, default) == default for name, default in _PLAIN.items())
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    columns = weight.shape[0 if _is_flipped(node) else 1]
    return plain and (bias is None or (bias.shape is not None and list(bias.shape) == [columns]))


_PRODUCTS = ("MatMul", "Gemm")
_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _is_flipped(node: onnx_ir.Node) -> bool:
    return bool(_setting(node, "transB", 0))


def _setting(node: onnx_ir.Node, name: str, default: float) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _parts(
    quantization: Quantization, name: str, weight: onnx_ir.Value, rows: int, columns: int
) -> tuple[onnx_ir.Value, ...]:
    assert weight.dtype is not None
    types = (onnx_ir.DataType.UINT8, weight.dtype, onnx_ir.DataType.UINT8)
    return tuple(
        onnx_ir.Value(name=part, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape))
        for part, dtype, shape in zip(
            quantization.part_names(name), types, quantization.part_shapes(rows, columns), strict=True
        )
    )


def _replace(
    node: onnx_ir.Node, parts: tuple[onnx_ir.Value, ...], quantization: Quantization, rows: int, columns: int
) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    # An input between the zero points and the bias is not used.
    inputs = [node.inputs[0], *parts, *((None, bias) if bias is not None else ())]
    node.domain, node.op_type = MICROSOFT_DOMAIN, QUANTIZED_PRODUCT
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
    node.attributes.clear()
    settings = {
        "K": rows,
        "N": columns,
        "bits": quantization.bits,
        "block_size": quantization.block,
        PRODUCT_ACCURACY: INT8_ACTIVATIONS,
    }
    node.attributes.update({name: onnx_ir.AttrInt64(name, value) for name, value in settings.items()})
