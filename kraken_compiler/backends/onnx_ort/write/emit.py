"""Writes the ONNX backend's part of an artifact: one complete model per device."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kraken_compiler.backends.onnx_ort.backend import OnnxOptions
from kraken_compiler.backends.onnx_ort.check.graph_windows import measure_windows
from kraken_compiler.backends.onnx_ort.format import (
    FORMAT_VERSION,
    META_CACHE,
    META_COLLECTIVES,
    META_DEGREE,
    META_FORMAT,
    META_FORMS,
    META_POSITIONS,
    META_SIZES,
    META_WEIGHTS,
    ORT_NCCL,
    CacheRecord,
)
from kraken_compiler.backends.onnx_ort.write.device_files import write_device_files
from kraken_compiler.backends.onnx_ort.write.export_graph import export_graph
from kraken_compiler.backends.onnx_ort.write.lane_layout import use_lane_layout
from kraken_compiler.backends.onnx_ort.write.prepare_step import prepare_lane, prepare_step
from kraken_compiler.backends.onnx_ort.write.tables import LaneTables, transposed_weights
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.size_checks import token_rules
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ops.op_sets import CAPPED_ATTENTION
from kraken_compiler.passes.sample_inputs import NO_LIMIT, position_limit
from kraken_compiler.progress import Advance

RUNNABLE = ("float32", "float16")
"""Element types that ONNX Runtime has kernels for on CPUs."""


def write_devices(
    program: LaneProgram,
    read: SourceReader,
    directory: Path,
    options: OnnxOptions,
    progress: Advance | None = None,
) -> tuple[Window, ...]:
    """Write `device-0.onnx` to `device-(N-1).onnx`, whose weights are in the lane files; see `Backend.write`.

    Tables and quantized weights are in files of their own.
    """
    _require_runnable(program)
    cached = program.cached
    exported = export_graph(prepare_lane(program) if cached is None else prepare_step(cached))
    # One device has nobody to add up with, so its model keeps none of the planned reduces.
    windows = measure_windows(exported.model.graph, program.plan if program.degree > 1 else None)
    if options.collectives == ORT_NCCL:
        from kraken_compiler.backends.onnx_ort.write.nccl import use_nccl

        use_nccl(exported.model)
    transposes = transposed_weights(cached) if cached is not None else {}
    if options.onnx_weights is not None:
        from kraken_compiler.backends.onnx_ort.write.quantize_products import quantize_products

        exported = quantize_products(exported, options.onnx_weights, transposes)
    exported = use_lane_layout(exported, transposes)
    tables = None if cached is None else LaneTables(program, cached, program.reader(read), exported.tables)
    metadata = {
        META_FORMAT: str(FORMAT_VERSION),
        META_DEGREE: str(program.degree),
        META_COLLECTIVES: options.collectives,
        META_FORMS: json.dumps(program.plan.forms),
    }
    if program.call.sizes:
        rules = program.call.sizes if cached is None else token_rules(program.call, program.inputs)
        shapes = {spec.name: spec.shape for spec in program.inputs} if cached is None else {}
        metadata[META_SIZES] = json.dumps({"rules": rules, "shapes": shapes})
    if options.onnx_weights is not None:
        metadata[META_WEIGHTS] = options.onnx_weights
    if cached is not None and tables is not None:
        records = [CacheRecord(one.heads, one.key_dim, one.value_dim, one.dtype) for one in cached.plan.caches]
        metadata[META_CACHE] = json.dumps([asdict(record) for record in records])
        metadata[META_POSITIONS] = json.dumps(tables.positions)
    elif (longest := position_limit(program)) < NO_LIMIT:
        metadata[META_POSITIONS] = json.dumps(longest)
    write_device_files(exported, program, read, tables, directory, metadata, progress)
    return windows


def _require_runnable(program: LaneProgram) -> None:
    dtypes = sorted({spec.dtype for spec in program.weights.values() if spec.torch_dtype.is_floating_point})
    other_dtypes = [dtype for dtype in dtypes if dtype not in RUNNABLE]
    if other_dtypes:
        raise UsageError(
            f"the onnx backend writes {' and '.join(RUNNABLE)}, and this model is {', '.join(other_dtypes)}; "
            "compile it with --dtype float32"
        )
    if program.cached is None and any(node.target is CAPPED_ATTENTION for node in program.graph.nodes):
        raise UsageError(
            "the onnx backend writes attention with capped scores or sinks only where it keeps a KV cache, and this "
            f"model has none: {program.no_cache}; compile it with --backend torch"
        )
