"""The multi-device annotation of the ONNX standard: which weights are parts, along which axis, of how many.

A device file holds its own part only; the annotation says what it is a part of (`ShardingSpec`, ONNX IR version 11).
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from kraken_compiler.ir.program import Program

CONFIGURATION = "kraken"
_IR_VERSION = 11


def annotate_shards(proto: onnx.ModelProto, program: Program, transposed: Collection[str]) -> None:
    """Annotate every node that reads a part of a weight.

    Args:
        proto: The model; written to.
        program: Its weight table says what is split how.
        transposed: Names of the weights that are stored transposed.
    """
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    devices = list(range(program.degree))
    proto.configuration.add(
        name=CONFIGURATION, num_devices=program.degree, device=[f"device-{device}" for device in devices]
    )
    sharded = {name: spec for name, spec in program.weights.items() if spec.shards}
    for node in proto.graph.node:
        specs = [sharded[name] for name in dict.fromkeys(node.input) if name in sharded]
        if not specs:
            continue
        configuration = node.device_configurations.add(configuration_id=CONFIGURATION)
        for spec in specs:
            entry = configuration.sharding_spec.add(tensor_name=spec.name, device=devices)
            for shard in spec.shards:
                axis = len(spec.source_shape) - 1 - shard.dim if spec.name in transposed else shard.dim
                size = spec.source_shape[shard.dim]
                entry.sharded_dim.add(axis=axis).simple_sharding.add(dim_value=size, num_shards=program.degree)
