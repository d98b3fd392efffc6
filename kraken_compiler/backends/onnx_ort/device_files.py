"""Device files: the shared graph with one device's weights beside it, written tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import onnx
import onnx_ir
import torch
from torch import Tensor

from kraken_compiler.backends.onnx_ort.export_graph import ExportedGraph
from kraken_compiler.backends.onnx_ort.format import (
    DOMAIN,
    DOMAIN_VERSION,
    META_DATA,
    META_LANE,
    META_PROGRAM,
    data_file,
    device_file,
)
from kraken_compiler.backends.onnx_ort.nccl import register_nccl_schemas
from kraken_compiler.backends.onnx_ort.quantization import quantize
from kraken_compiler.backends.onnx_ort.schemas import register_schemas
from kraken_compiler.backends.onnx_ort.sharding import annotate_shards
from kraken_compiler.backends.onnx_ort.tables import LaneTables
from kraken_compiler.file_errors import naming
from kraken_compiler.ir.program import Program
from kraken_compiler.progress import Advance
from kraken_compiler.weights.safetensors_format import byte_view
from kraken_compiler.weights.shards import lane_parts

PAGE = 4096
"""Large tensors begin on a page, so that they can be mapped."""
_SMALL_ALIGNMENT = 64
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in every device's data file."""

    value: onnx_ir.Value
    offset: int
    nbytes: int


def write_device_files(
    exported: ExportedGraph,
    program: Program,
    read: Callable[[str], Tensor],
    tables: LaneTables | None,
    directory: Path,
    metadata: Mapping[str, str],
    progress: Advance | None = None,
) -> None:
    """Write the model and the weights of every device, and check the models.

    Every source tensor is read once; memory stays around the largest of them.

    Args:
        exported: The shared graph.
        program: The lane program whose weight table says what each lane owns.
        read: Gives a whole source tensor by name.
        tables: The lanes' tables, None if there are none.
        directory: An existing directory.
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
    places = _layout({name: value for name, value in exported.weights.items() if name not in inline})
    proto = _shared_proto(exported, program, places, metadata)
    for name, value in inline.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(_stored(exported, name, value).numpy(), name))
    shared = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    with ExitStack() as stack:
        files = [
            stack.enter_context((directory / data_file(lane)).open("wb", buffering=0)) for lane in range(program.degree)
        ]
        end = max((place.offset + place.nbytes for place in places.values()), default=0)
        for file in files:
            with naming(Path(file.name)):
                file.truncate(end)
        for lane, file in enumerate(files):
            for name, value in (tables.of(lane) if tables is not None else {}).items():
                for part, content in _parts(exported, name, value).items():
                    _write(file, places[part], content)
        specs = [program.weights[name] for name in exported.sources if name not in inline]
        for spec, lane, local in lane_parts(program, specs, read, progress):
            for name, value in _parts(exported, spec.name, local).items():
                _write(files[lane], places[name], value)
    for lane in range(program.degree):
        with (directory / data_file(lane)).open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        _finish(proto, lane, digest, shared, directory / device_file(lane))


def _inline(exported: ExportedGraph, program: Program, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Small whole numbers that all devices share, by name: shapes follow from them, and are wanted without the data."""
    reader = program.reader(read)
    specs = [program.weights[name] for name in exported.sources]
    return {
        spec.name: reader(spec.source).to(spec.torch_dtype)
        for spec in specs
        if not spec.shards and not spec.torch_dtype.is_floating_point and spec.nbytes <= _INLINE_BYTES
    }


def _layout(weights: Mapping[str, onnx_ir.Value]) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    end = 0
    for name, value in weights.items():
        assert value.shape is not None
        assert value.dtype is not None
        nbytes = int(value.dtype.itemsize * torch.Size(value.shape.numpy()).numel())
        alignment = PAGE if nbytes >= PAGE else _SMALL_ALIGNMENT
        offset = -(-end // alignment) * alignment
        places[name] = _Place(value, offset, nbytes)
        end = offset + nbytes
    return places


def _stored(exported: ExportedGraph, name: str, value: Tensor) -> Tensor:
    return value.t() if name in exported.transposed else value


def _parts(exported: ExportedGraph, name: str, value: Tensor) -> dict[str, Tensor]:
    """What is stored of a weight, by name in the file."""
    stored = _stored(exported, name, value)
    how = exported.quantized.get(name)
    return {name: stored} if how is None else dict(zip(how.part_names(name), quantize(stored, how), strict=True))


def _write(file: IO[bytes], place: _Place, tensor: Tensor) -> None:
    content = memoryview(byte_view(tensor.cpu().contiguous()))
    assert content.nbytes == place.nbytes, f"{place.value.name}: {content.nbytes} bytes instead of {place.nbytes}"
    with naming(Path(file.name)):
        file.seek(place.offset)
        while content.nbytes:
            content = content[file.write(content) :]


def _shared_proto(
    exported: ExportedGraph, program: Program, places: Mapping[str, _Place], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The model as all devices have it: weights are declared, but nowhere yet."""
    from kraken_compiler import __name__ as package

    model = exported.model
    model.producer_name = package
    model.producer_version = None
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.metadata_props.update(metadata)
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    for name, place in places.items():
        assert place.value.shape is not None
        assert place.value.dtype is not None
        tensor = proto.graph.initializer.add(
            name=name,
            data_type=place.value.dtype.value,
            dims=place.value.shape.numpy(),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("offset", place.offset), ("length", place.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    annotate_shards(proto, program, exported.transposed, exported.quantized)
    return proto


def _finish(shared: onnx.ModelProto, lane: int, digest: str, program: str, path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(shared)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.external_data.add(key="location", value=data_file(lane))
    for key, value in ((META_LANE, str(lane)), (META_DATA, digest), (META_PROGRAM, program)):
        proto.metadata_props.add(key=key, value=value)
    with naming(path):
        path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=False)
