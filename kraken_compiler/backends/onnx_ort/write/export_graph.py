"""The export of a prepared graph to an ONNX model whose weights are still to come."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir

from kraken_compiler._torch_compat import onnx_model
from kraken_compiler.backends.onnx_ort.check.graph_windows import is_gemm
from kraken_compiler.backends.onnx_ort.format import DOMAIN, OPSET, START, WAIT
from kraken_compiler.backends.onnx_ort.write.dequantize_weights import dequantize_weights
from kraken_compiler.backends.onnx_ort.write.prepare_step import PreparedGraph
from kraken_compiler.backends.onnx_ort.write.quantization import Quantization
from kraken_compiler.backends.onnx_ort.write.translations import translations
from kraken_compiler.capture.quiet import quiet_torch


@dataclass(frozen=True)
class ExportedGraph:
    """An ONNX model of every device, without weights.

    Attributes:
        model: Its inputs are those of the file only.
        weights: The initializers to come: name in the file (which is the placeholder's) -> the value, typed and shaped
            as it is to be stored.
        transposed: Those that are stored transposed, because they are multiplied with that way.
        tables: Which of them are tables.
        quantized: Weights that are stored in parts, and how; `weights` has the parts, see `quantize_products`.
    """

    model: onnx_ir.Model
    weights: dict[str, onnx_ir.Value]
    transposed: frozenset[str]
    tables: frozenset[str]
    quantized: Mapping[str, Quantization] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """Names in the weight table of all that is stored, tables apart."""
        parts = {part for name, quantization in self.quantized.items() for part in quantization.part_names(name)}
        return [name for name in self.weights if name not in self.tables | parts] + [
            name for name in self.quantized if name not in self.tables
        ]


def export_graph(prepared: PreparedGraph) -> ExportedGraph:
    """Export a graph. It is consumed.

    Nodes keep their order, attention stays one node, and the collectives are nodes of our domain. A weight that is only
    read through a transposition is stored transposed instead.
    """
    names = [*prepared.weights, *prepared.tables, *prepared.inputs.values()]
    with quiet_torch():
        model: onnx_ir.Model = onnx_model(prepared.graph, translations(), OPSET)
    dequantize_weights(model)
    graph = model.graph
    assert len(graph.inputs) == len(names), f"{len(graph.inputs)} inputs instead of {len(names)}"
    assert len(graph.outputs) == len(prepared.outputs), f"{len(graph.outputs)} outputs: {graph.outputs}"
    reserved_names = {*names, *prepared.outputs}
    for value in (value for node in graph for value in node.outputs if value.name in reserved_names):
        value.name = f"{value.name}_value"
    for value, name in zip(graph.inputs, names):
        value.name = name
    for value, name in zip(graph.outputs, prepared.outputs):
        value.name = name
    _name_dims(graph, prepared.dims)
    weight_count = len(prepared.weights) + len(prepared.tables)
    weights, transposed = _take_weights(graph, weight_count)
    _drop_unused_outputs(graph)
    _pin_waits(graph)
    _name_nodes(graph)
    model.metadata_props.clear()
    return ExportedGraph(model, weights, transposed, frozenset(prepared.tables))


def _name_dims(graph: onnx_ir.Graph, dims: dict[str, str]) -> None:
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in dims) or r"(?!)")
    node_outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *node_outputs):
        if value.shape is None:
            continue
        sizes: list[int | str | None] = []
        for size in value.shape:
            text = size.value if isinstance(size, onnx_ir.SymbolicDim) else size
            sizes.append(symbols.sub(lambda match: dims[match.group()], text) if isinstance(text, str) else text)
        value.shape = onnx_ir.Shape(sizes)


def _take_weights(graph: onnx_ir.Graph, count: int) -> tuple[dict[str, onnx_ir.Value], frozenset[str]]:
    """Make the first inputs values that are to be stored; returns them, and which of them are to be transposed."""
    values = list(graph.inputs[:count])
    del graph.inputs[:count]
    weights: dict[str, onnx_ir.Value] = {}
    transposed = set()
    for value in values:
        assert value.name is not None
        users = [use.node for use in value.uses()]
        flips = all(node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0] for node in users)
        if users and flips:
            initializer = onnx_ir.Value(name=value.name, type=value.type, shape=users[0].outputs[0].shape)
            for node in users:
                node.outputs[0].replace_all_uses_with(initializer)
                graph.remove(node, safe=True)
            transposed.add(value.name)
            weights[value.name] = initializer
        else:
            weights[value.name] = value
    return weights, frozenset(transposed)


def _handle(wait: onnx_ir.Node) -> onnx_ir.Value:
    handle = wait.inputs[0]
    assert handle is not None, f"{wait.name} waits for nothing"
    return handle


def _drop_unused_outputs(graph: onnx_ir.Graph) -> None:
    """Drop optional outputs that nobody reads, for a named one is computed: of attention, that is all scores."""
    for node in graph:
        while (
            len(node.outputs) > _required_outputs(node)
            and not node.outputs[-1].uses()
            and not node.outputs[-1].is_graph_output()
        ):
            node.resize_outputs(len(node.outputs) - 1)


def _required_outputs(node: onnx_ir.Node) -> int:
    """The number of outputs a node must name, read or not: also a top-k's values, and all pieces of a split."""
    if not onnx.defs.has(node.op_type, node.domain):
        return 1
    schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    options = {output.option for output in schema.outputs}
    is_variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic in options
    return len(node.outputs) if is_variadic else max(1, int(schema.min_output))


_SCOPES = "pkg.torch.onnx.name_scopes"


def _name_nodes(graph: onnx_ir.Graph) -> None:
    """Name nodes after the module they come from, and forget what else the exporter noted about them."""
    name_counts: Counter[str] = Counter()
    for node in graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        node.metadata_props.clear()
        name = f"{module}/{node.op_type}" if module else node.op_type
        name_counts[name] += 1
        node.name = name if name_counts[name] == 1 else f"{name}_{name_counts[name] - 1}"


def _pin_waits(graph: onnx_ir.Graph) -> None:
    """Make every wait depend on the last product before it, so that nobody who reorders the file waits early."""
    product, product_at = None, -1
    start_places: dict[onnx_ir.Value, int] = {}
    for place, node in enumerate(graph):
        if is_gemm(node):
            product, product_at = node.outputs[0], place
        elif node.domain == DOMAIN and node.op_type == START:
            start_places[node.outputs[0]] = place
        elif node.domain == DOMAIN and node.op_type == WAIT and product_at > start_places[_handle(node)]:
            node.resize_inputs(2)
            node.replace_input_with(1, product)
