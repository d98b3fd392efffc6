"""Device files: the shared graph, and the places of one device's weights in the files beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor

from kraken_compiler.backends.onnx_ort.format import (
    DOMAIN,
    DOMAIN_VERSION,
    META_FILES,
    META_LANE,
    META_PROGRAM,
    SHARED_DATA_FILE,
    data_file,
    device_file,
    weight_files,
)
from kraken_compiler.backends.onnx_ort.write.export_graph import ExportedGraph
from kraken_compiler.backends.onnx_ort.write.nccl import register_nccl_schemas
from kraken_compiler.backends.onnx_ort.write.quantization import quantize
from kraken_compiler.backends.onnx_ort.write.schemas import register_schemas
from kraken_compiler.backends.onnx_ort.write.sharding import annotate_shards
from kraken_compiler.backends.onnx_ort.write.tables import LaneTables
from kraken_compiler.errors import naming
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance
from kraken_compiler.weights.io.safetensors_format import TensorEntry, read_header
from kraken_compiler.weights.io.safetensors_writer import new_safetensors
from kraken_compiler.weights.write_shards import by_source, lane_files_with, lane_parts

_INLINE_BYTES = 1024
_INDEX_DTYPES = (torch.int64, torch.int32)


def write_device_files(
    exported: ExportedGraph,
    program: Program,
    read: SourceReader,
    tables: LaneTables | None,
    directory: Path,
    metadata: Mapping[str, str],
    progress: Advance | None = None,
) -> None:
    """Write the model of every device and the weights that are not there yet, and check the models.

    Every source tensor is read once; memory stays around the largest of them.

    Args:
        exported: The shared graph, see `use_lane_layout`.
        program: The lane program whose weight table says what each lane owns.
        read: Gives the source's tensors.
        tables: The lanes' tables, None if there are none.
        directory: An existing directory, which may hold lane files of the program.
        metadata: What all files say.
        progress: Told about every source tensor that is done.

    Raises:
        InputFileError: A source tensor cannot be read.
        OSError: A file cannot be written; names it.
    """
    register_schemas()
    register_nccl_schemas()
    for name, shape in (tables.shapes if tables is not None else {}).items():
        # How many positions they hold was not known at export.
        if name not in exported.quantized:
            exported.weights[name].shape = onnx_ir.Shape(shape[::-1] if name in exported.transposed else shape)
    inline = _inline(exported, program, read)
    source_names = [name for name in exported.sources if name not in inline[0] and name not in exported.quantized]
    weights = replace(program, weights={name: program.weights[name] for name in source_names})
    files = {path.name: mark.sha256 for path, mark in lane_files_with(weights, read, directory, progress).items()}
    files |= _write_rest(exported, program, read, tables, directory, progress)
    entries = {name: read_header(directory / name) for name in files}
    proto = _shared_proto(exported, program, [name for name in exported.weights if name not in inline[0]], metadata)
    proto.graph.initializer.extend(value for name, value in inline[0].items() if not program.weights[name].shards)
    proto.metadata_props.add(
        key=META_PROGRAM, value=hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    )
    for lane in range(program.degree):
        places = {name: entry for file in weight_files(lane) for name, entry in entries.get(file, {}).items()}
        own_tensors = [value for name, value in inline[lane].items() if program.weights[name].shards]
        _finish(proto, lane, places, own_tensors, files, directory / device_file(lane))


def _write_rest(
    exported: ExportedGraph,
    program: Program,
    read: SourceReader,
    tables: LaneTables | None,
    directory: Path,
    progress: Advance | None,
) -> dict[str, str]:
    """Write the weights that no lane file holds: tables, and quantized ones. Returns the files and their hashes."""
    table_names = [name for name in exported.weights if name in exported.tables]
    table_names += [name for name in exported.quantized if name in exported.tables]
    specs = by_source(program.weights[name] for name in exported.quantized if name not in exported.tables)
    quantized_specs = [spec for of_source in specs.values() for spec in of_source]
    shared_names = {spec.name for spec in quantized_specs if program.degree > 1 and spec.shared}

    def contents(names: Iterable[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {part: _type(exported.weights[part]) for name in names for part in _part_names(exported, name)}

    own_contents = contents([*table_names, *(spec.name for spec in quantized_specs if spec.name not in shared_names)])
    files = dict.fromkeys((data_file(lane) for lane in range(program.degree)), own_contents)
    files[SHARED_DATA_FILE] = contents(spec.name for spec in quantized_specs if spec.name in shared_names)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(new_safetensors(directory / name, entries))
            for name, entries in files.items()
            if entries
        }
        for lane in range(program.degree):
            values = tables.of(lane) if tables is not None and table_names else {}
            for name in table_names:
                for part, content in _parts(exported, name, values[name]).items():
                    writers[data_file(lane)].append(part, content)
        for spec, lane, local in lane_parts(program, quantized_specs, read, progress if quantized_specs else None):
            for part, content in _parts(exported, spec.name, local).items():
                if spec.name not in shared_names:
                    writers[data_file(lane)].append(part, content)
                elif lane == 0:
                    writers[SHARED_DATA_FILE].append(part, content)
        return {name: writer.mark.sha256 for name, writer in writers.items()}


def _inline(exported: ExportedGraph, program: Program, read: SourceReader) -> tuple[dict[str, onnx.TensorProto], ...]:
    """Small indices and sizes, by device and name, which ONNX Runtime wants to know when it opens a model.

    Shapes follow from them. And it takes one for a constant of the graph that has the same value, wherever that is.
    """
    specs = [program.weights[name] for name in exported.sources]
    small_specs = [spec for spec in specs if spec.torch_dtype in _INDEX_DTYPES and spec.nbytes <= _INLINE_BYTES]
    devices: tuple[dict[str, onnx.TensorProto], ...] = tuple({} for _ in range(program.degree))
    for spec, lane, local in lane_parts(program, small_specs, read):
        tensor = _stored_tensor(exported, spec.name, local).contiguous()
        devices[lane][spec.name] = onnx.numpy_helper.from_array(tensor.numpy(), spec.name)
    return devices


def _type(value: onnx_ir.Value) -> tuple[torch.dtype, tuple[int, ...]]:
    assert value.shape is not None
    assert value.dtype is not None
    return torch.from_numpy(np.empty(0, value.dtype.numpy())).dtype, tuple(value.shape.numpy())


def _stored_tensor(exported: ExportedGraph, name: str, value: Tensor) -> Tensor:
    return value.t() if name in exported.transposed else value


def _part_names(exported: ExportedGraph, name: str) -> tuple[str, ...]:
    quantization = exported.quantized.get(name)
    return (name,) if quantization is None else quantization.part_names(name)


def _parts(exported: ExportedGraph, name: str, value: Tensor) -> dict[str, Tensor]:
    """The stored parts of a weight, by name in the file."""
    tensor = _stored_tensor(exported, name, value)
    quantization = exported.quantized.get(name)
    parts = (tensor,) if quantization is None else quantize(tensor, quantization)
    return dict(zip(_part_names(exported, name), parts, strict=True))


def _shared_proto(
    exported: ExportedGraph, program: Program, external_names: Sequence[str], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The model as all devices have it: weights are declared, but nowhere yet."""

    model = exported.model
    model.producer_name = "kraken_compiler"
    model.producer_version = None
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.metadata_props.update(metadata)
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    for name in external_names:
        value = exported.weights[name]
        assert value.shape is not None
        assert value.dtype is not None
        proto.graph.initializer.add(
            name=name,
            data_type=value.dtype.value,
            dims=value.shape.numpy(),
            data_location=onnx.TensorProto.EXTERNAL,
        )
    annotate_shards(proto, program, exported.transposed, exported.quantized)
    return proto


def _finish(
    shared_proto: onnx.ModelProto,
    lane: int,
    places: Mapping[str, TensorEntry],
    own_tensors: Sequence[onnx.TensorProto],
    hashes: Mapping[str, str],
    path: Path,
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(shared_proto)
    file_names = set()
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = places[tensor.name]
            nbytes = math.prod(tensor.dims) * onnx_ir.DataType(tensor.data_type).itemsize
            assert place.nbytes == nbytes, f"{tensor.name}: {place.nbytes} bytes instead of {nbytes}"
            for key, value in (("location", place.path.name), ("offset", place.start), ("length", place.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file_names.add(place.path.name)
    proto.graph.initializer.extend(own_tensors)
    files = {name: hashes[name] for name in sorted(file_names)}
    for key, value in ((META_LANE, str(lane)), (META_FILES, json.dumps(files))):
        proto.metadata_props.add(key=key, value=value)
    with naming(path):
        path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=False)
