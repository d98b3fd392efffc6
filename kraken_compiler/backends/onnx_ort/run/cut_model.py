"""Cuts a device's model at its collectives: stock ONNX Runtime runs what lies between them.

    rms_norm, products, AllReduceStart, attention, AllReduceWait, add, ...
    [------ stage ----] [--- start --] [- stage -] [--- wait ---] [stage

The steps run in the order of the file, so what lies between a start and its wait runs while the sum is on its way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx

from kraken_compiler.backends.onnx_ort.format import (
    COLLECTIVES,
    DOMAIN,
    FUSED_PRODUCT,
    GATHER,
    MICROSOFT_DOMAIN,
    MICROSOFT_VERSION,
    PRESENT_PREFIX,
    START,
    WAIT,
)
from kraken_compiler.errors import InputFileError


@dataclass(frozen=True)
class Stage:
    """A part of the model that ONNX Runtime runs as a whole.

    Attributes:
        model: It, with references to the weights in the device's data file.
        inputs, outputs: Names of values, which are named as in the whole model.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Collective:
    """A collective.

    Attributes:
        name: The node's.
        kind: `START`, `WAIT` or `GATHER`.
        operand: Name of the value it takes; of a wait, the handle.
        result: Name of the value it gives; of a start, the handle.
        axis: Along which a gather concatenates.
    """

    name: str
    kind: str
    operand: str
    result: str
    axis: int = 0


Step = Stage | Collective


@dataclass(frozen=True)
class Turn:
    """The steps, by number, that a part of the tokens runs before it is the next part's turn.

    Attributes:
        last: Those of the last part.
        earlier: Those of a part before it, of which only what it keeps for later tokens is wanted.
    """

    last: tuple[int, ...]
    earlier: tuple[int, ...]


def cut(model: onnx.ModelProto, *, fuse: bool = True) -> list[Step]:
    """Cut a model.

    Args:
        model: The whole model.
        fuse: Multiply with float32 weights as they are stored, by an op of ONNX Runtime's own, where the model
            transposes them first: its own optimizer would keep a transposed copy.

    Raises:
        InputFileError: A value is used before it is there, or has no type, or a collective or a name is malformed.
    """
    try:
        return _cut(model, _without_transposes(model.graph) if fuse else model.graph.node)
    except (UnicodeDecodeError, TypeError) as error:
        raise InputFileError("damaged: a name in it is no text") from error


def _cut(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[Step]:
    graph = model.graph
    runs: list[list[onnx.NodeProto] | Collective] = [[]]
    for node in nodes:
        if node.domain == DOMAIN:
            runs += [_collective(node), []]
        else:
            last = runs[-1]
            assert isinstance(last, list)
            last.append(node)
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    later_reads = {value.name for value in graph.output}
    steps: list[Step] = []
    for part in reversed(runs):
        if isinstance(part, Collective):
            steps.append(part)
            later_reads.add(part.operand)
        elif part:
            stage = _stage(model, part, later_reads, types, weights)
            steps.append(stage)
            later_reads.update(stage.inputs)
    steps.reverse()
    _check_order(steps, {value.name for value in graph.input}, {value.name for value in graph.output})
    return steps


def turns(steps: Sequence[Step], outputs: Iterable[str]) -> list[Turn]:
    """The turns of a model's steps: each ends with the start of a reduce, the last one with the model.

    Args:
        steps: What `cut` gave.
        outputs: Names of the model's outputs.
    """
    needed_names = {name for name in outputs if name.startswith(PRESENT_PREFIX)}
    needed_steps: set[int] = set()
    ends = [len(steps)]
    for number in reversed(range(len(steps))):
        step = steps[number]
        results, operands = (
            (step.outputs, step.inputs) if isinstance(step, Stage) else ((step.result,), (step.operand,))
        )
        if not needed_names.isdisjoint(results):
            needed_steps.add(number)
            needed_names.update(operands)
        if isinstance(step, Collective) and step.kind == START:
            ends.append(number + 1)
    ranges = [range(first, end) for first, end in pairwise([0, *reversed(ends)])]
    return [Turn(tuple(steps_of), tuple(sorted(needed_steps.intersection(steps_of)))) for steps_of in ranges]


def _without_transposes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph, in which a product with a weight that was transposed for it is one node."""
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    readers = Counter(
        [name for node in graph.node for name in _operand_names(node)] + [value.name for value in graph.output]
    )
    flips = {
        node.output[0]: node.input[0]
        for node in graph.node
        if (node.domain, node.op_type, len(node.input), len(node.output)) == ("", "Transpose", 1, 1)
        and node.input[0] in floats
        and [list(attribute.ints) for attribute in node.attribute] == [[1, 0]]
        and readers[node.output[0]] == 1
    }
    nodes, fused_flips = [], set()
    for node in graph.node:
        is_product = (node.domain, node.op_type, len(node.input)) == ("", "MatMul", 2)
        if is_product and node.input[1] in flips:
            fused_flips.add(node.input[1])
            operands = [node.input[0], flips[node.input[1]]]
            product = onnx.NodeProto(name=node.name, op_type=FUSED_PRODUCT, domain=MICROSOFT_DOMAIN, input=operands)
            product.output.extend(node.output)
            product.attribute.append(onnx.helper.make_attribute("transB", 1))
            nodes.append(product)
        else:
            nodes.append(node)
    return [node for node in nodes if node.op_type != "Transpose" or fused_flips.isdisjoint(node.output)]


def _collective(node: onnx.NodeProto) -> Collective:
    if node.op_type not in COLLECTIVES or not node.input or len(node.output) != 1:
        raise InputFileError(f"refused: '{node.name}' is no collective that this version knows ({node.op_type})")
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return Collective(node.name, node.op_type, node.input[0], node.output[0], axis)


def _stage(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    later_reads: Iterable[str],
    types: Mapping[str, onnx.ValueInfoProto],
    weights: Mapping[str, onnx.TensorProto],
) -> Stage:
    node_outputs = {name for node in nodes for name in node.output if name}
    operands = dict.fromkeys(
        name for node in nodes for name in _operand_names(node) if name and name not in node_outputs
    )
    inputs = tuple(name for name in operands if name not in weights)
    outputs = tuple(name for node in nodes for name in node.output if name in set(later_reads))
    untyped_names = [name for name in (*inputs, *outputs) if name not in types]
    if untyped_names:
        raise InputFileError(f"damaged: value '{untyped_names[0]}' has no type")
    part = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    part.opset_import.extend(entry for entry in model.opset_import if entry.domain not in (DOMAIN, MICROSOFT_DOMAIN))
    part.opset_import.add(domain=MICROSOFT_DOMAIN, version=MICROSOFT_VERSION)
    part.functions.extend(model.functions)
    part.graph.name = nodes[0].name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(weights[name] for name in operands if name in weights)
    part.graph.input.extend(types[name] for name in inputs)
    part.graph.output.extend(types[name] for name in outputs)
    for node in part.graph.node:
        # What they refer to is declared in the whole model only.
        del node.device_configurations[:]
    return Stage(part, inputs, outputs)


def _operand_names(node: onnx.NodeProto) -> Iterable[str]:
    """The names that a node reads, also inside of its branches and loop bodies."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            inner_names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inner_names |= {name for inner in graph.node for name in inner.output}
            yield from (name for inner in graph.node for name in _operand_names(inner) if name not in inner_names)


def _check_order(steps: Iterable[Step], inputs: set[str], outputs: set[str]) -> None:
    available, handles = set(inputs), set()
    for step in steps:
        reads = step.inputs if isinstance(step, Stage) else () if step.kind == WAIT else (step.operand,)
        missing_names = [name for name in reads if name not in available]
        if missing_names:
            raise InputFileError(f"damaged: value '{missing_names[0]}' is used before it is there")
        if isinstance(step, Stage):
            available.update(step.outputs)
        elif step.kind == START:
            handles.add(step.result)
        else:
            if step.kind == WAIT and step.operand not in handles:
                raise InputFileError(f"damaged: '{step.name}' waits for a sum that was not begun, or waits twice")
            handles.discard(step.operand)
            assert step.kind in (WAIT, GATHER)
            available.add(step.result)
    if handles or not outputs <= available:
        raise InputFileError(f"damaged: {sorted(handles | (outputs - available))[0]} is never waited for or never made")
