"""Replaces products with weights by products with quantized weights.

    MatMul(x, weight [K, N])     ->  MatMulNBits(x, weight_Q4, weight_scales, weight_zero_points)
    Gemm(x, weight [K, N], bias) ->  the same, with the bias; also of a weight [N, K] and transB

An embedding that is also the head is looked up in the same integers, of 8 bits. A weight that anything else reads too,
and what is no right operand of a product (other embeddings, norms, biases, tables) stay as they are. The last product,
a language model's head, has 8 bits in any case: nothing comes after it that could even its errors out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from kraken_compiler.backends.onnx_ort.write.quantized_lookups import is_lookup, look_up_quantized

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
        reads = _reads(value)
        is_computed = name in exported.tables and name not in transposes
        origin = transposes.get(name, name)
        if is_computed or origins[origin] > 1 or reads is None:
            continue
        assert value.shape is not None
        rows, columns = value.shape.numpy()
        if reads.flipped:
            rows, columns = columns, rows
            transposed ^= {name}
        del weights[name]
        quantization = quantized[name] = QUANTIZATIONS["int8" if last in reads.products or reads.lookups else kind]
        parts = _parts(quantization, name, value, rows, columns)
        weights.update({str(part.name): part for part in parts})
        notes = {
            NODE_WEIGHT: origin,
            NODE_TRANSPOSED: str((name in transposed) != (name in transposes)),
        }
        for node in reads.products:
            _replace(node, parts, quantization, rows, columns)
            node.metadata_props.update(notes)
        for node in reads.lookups:
            look_up_quantized(node, parts, rows)
        exported.model.graph.remove(reads.transposes, safe=True)
    if quantized:
        exported.model.opset_imports[MICROSOFT_DOMAIN] = MICROSOFT_VERSION
    return replace(exported, weights=weights, transposed=frozenset(transposed), quantized=quantized)


@dataclass(frozen=True)
class _Reads:
    """All that reads a weight.

    Attributes:
        products: Products with it.
        flipped: They multiply with it transposed.
        lookups: Lookups of its rows.
        transposes: What transposes it for its products.
    """

    products: list[onnx_ir.Node]
    flipped: bool
    lookups: list[onnx_ir.Node]
    transposes: list[onnx_ir.Node]


def _reads(weight: onnx_ir.Value) -> _Reads | None:
    """What reads a weight; None if there is no product among it, or anything but products and lookups of rows."""
    nodes = [use.node for use in weight.uses()]
    lookups = [node for node in nodes if is_lookup(node, weight)]
    transposes = [node for node in nodes if lookups and node.op_type == "Transpose"]
    products = [(node, weight) for node in nodes if node not in lookups and node not in transposes]
    products += [(use.node, node.outputs[0]) for node in transposes for use in node.outputs[0].uses()]
    if not products or not all(_is_product(node, operand) for node, operand in products):
        return None
    flips = {_is_flipped(node) == (operand is weight) for node, operand in products}
    # A row that is looked up must be a column of what products sum over.
    if len(flips) > 1 or (lookups and flips != {True}):
        return None
    return _Reads([node for node, _ in products], flips == {True}, lookups, transposes)


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
