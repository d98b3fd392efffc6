"""The multi-device annotation of the ONNX standard: which weights are parts, along which axis, of how many.

A device file holds its own part only; the annotation says what it is a part of (`ShardingSpec`, ONNX IR version 11).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

from kraken_compiler.backends.onnx_ort.write.quantization import Quantization
from kraken_compiler.ir.program import Program

CONFIGURATION = "kraken"
_IR_VERSION = 11
_ROWS, _COLUMNS = 0, 1


def annotate_shards(
    proto: onnx.ModelProto, program: Program, transposed: Collection[str], quantized: Mapping[str, Quantization]
) -> None:
    """Annotate every node that reads a part of a weight.

    Args:
        proto: The model; written to.
        program: Its weight table says what is split how.
        transposed: Names of the weights that are stored transposed.
        quantized: Those that are stored in parts, and how.
    """
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    devices = list(range(program.degree))
    proto.configuration.add(
        name=CONFIGURATION, num_devices=program.degree, device=[f"device-{device}" for device in devices]
    )
    sharded_axes: dict[str, dict[int, int]] = {}
    file_dims = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    for name, spec in program.weights.items():
        if spec.shards:
            axes = {
                len(spec.source_shape) - 1 - shard.dim if name in transposed else shard.dim: shard.dim
                for shard in spec.shards
            }
            # Two integers that share a byte in the weight table are two elements in the file.
            dims = file_dims.get(name, spec.shape[::-1] if name in transposed else spec.shape)
            whole_sizes = {axis: spec.source_shape[dim] * dims[axis] // spec.shape[dim] for axis, dim in axes.items()}
            local_sizes = {axis: spec.shape[dim] for axis, dim in axes.items()}
            sharded_axes |= (
                _sharded_parts(name, quantized[name], whole_sizes, local_sizes)
                if name in quantized
                else {name: whole_sizes}
            )
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in sharded_axes and len(file_dims[node.input[0]]) == 2:
            sharded_axes[node.output[0]] = {1 - axis: size for axis, size in sharded_axes[node.input[0]].items()}
        names = [name for name in dict.fromkeys(node.input) if sharded_axes.get(name)]
        if not names:
            continue
        configuration = node.device_configurations.add(configuration_id=CONFIGURATION)
        for name in names:
            entry = configuration.sharding_spec.add(tensor_name=name, device=devices)
            for axis, size in sharded_axes[name].items():
                entry.sharded_dim.add(axis=axis).simple_sharding.add(dim_value=size, num_shards=program.degree)


def _sharded_parts(
    name: str, quantization: Quantization, whole_sizes: Mapping[int, int], local_sizes: Mapping[int, int]
) -> dict[str, dict[int, int]]:
    """The sharded axes of a quantized weight's parts: axis of a part -> size of the whole.

    Args:
        name: The weight's.
        quantization: How it is quantized.
        whole_sizes, local_sizes: Axis of the weight [K, N] -> size of the whole and of a device's.
    """
    parts = quantization.part_names(name)
    axes = {part: {0: whole_sizes[_COLUMNS]} if _COLUMNS in whole_sizes else {} for part in parts}
    # Blocks that do not end where a device's rows end are no parts of the whole weight's blocks.
    if (
        _ROWS in whole_sizes
        and local_sizes[_ROWS] % quantization.block == 0
        and whole_sizes[_ROWS] % local_sizes[_ROWS] == 0
    ):
        integers, scales, zero_points = parts
        blocks = whole_sizes[_ROWS] // quantization.block
        axes[integers][1] = axes[scales][1] = blocks
        if local_sizes[_ROWS] // quantization.block * quantization.bits % 8 == 0:
            axes[zero_points][1] = blocks * quantization.bits // 8
    return axes
