"""Device files: the shared graph with one device's weights beside it, written tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
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
    META_SHARED_DATA,
    SHARED_DATA_FILE,
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
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance
from kraken_compiler.weights.safetensors_format import byte_view
from kraken_compiler.weights.shards import lane_parts

PAGE = 4096
"""Large tensors begin on a page, so that they can be mapped."""
_SMALL_ALIGNMENT = 64
_INLINE_BYTES = 1024
_INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: in every device's data file, or once in the one that they share."""

    value: onnx_ir.Value
    shared: bool
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def file(self, lane: int) -> str:
        """Name of the file in which device `lane` finds it."""
        return SHARED_DATA_FILE if self.shared else data_file(lane)


def write_device_files(
    exported: ExportedGraph,
    program: Program,
    read: SourceReader,
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
    outside = {name: value for name, value in exported.weights.items() if name not in inline[0]}
    places = _layout(outside, _shared_names(exported, program))
    proto = _shared_proto(exported, program, places, metadata)
    proto.graph.initializer.extend(value for name, value in inline[0].items() if not program.weights[name].shards)
    same = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    ends = dict.fromkeys(map(data_file, range(program.degree)), 0)
    for place in places.values():
        ends |= {place.file(lane): place.end for lane in range(program.degree)}
    with ExitStack() as stack:
        files = {name: stack.enter_context((directory / name).open("wb", buffering=0)) for name in ends}
        for name, end in ends.items():
            with naming(directory / name):
                files[name].truncate(end)
        for lane in range(program.degree):
            for name, value in (tables.of(lane) if tables is not None else {}).items():
                for part, content in _parts(exported, name, value).items():
                    _write(files[data_file(lane)], places[part], content)
        specs = [program.weights[name] for name in exported.sources if name not in inline[0]]
        for spec, lane, local in lane_parts(program, specs, read, progress):
            for name, value in _parts(exported, spec.name, local).items():
                if lane == 0 or not places[name].shared:
                    _write(files[places[name].file(lane)], places[name], value)
    digests = {name: _digest(directory / name) for name in ends}
    for lane in range(program.degree):
        hashes = {META_DATA: digests[data_file(lane)], META_PROGRAM: same}
        if SHARED_DATA_FILE in digests:
            hashes[META_SHARED_DATA] = digests[SHARED_DATA_FILE]
        own = [value for name, value in inline[lane].items() if program.weights[name].shards]
        _finish(proto, lane, places, own, hashes, directory / device_file(lane))


def _shared_names(exported: ExportedGraph, program: Program) -> set[str]:
    """What is stored of the weights that all of several devices hold whole, by name in the file."""
    shared = [name for name in exported.sources if program.degree > 1 and program.weights[name].shared]
    quantized = exported.quantized
    return {part for name in shared for part in (quantized[name].part_names(name) if name in quantized else (name,))}


def _digest(path: Path) -> str:
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inline(exported: ExportedGraph, program: Program, read: SourceReader) -> tuple[dict[str, onnx.TensorProto], ...]:
    """Small indices and sizes, by device and name, which ONNX Runtime wants to know when it opens a model.

    Shapes follow from them. And it takes one for a constant of the graph that has the same value, wherever that is.
    """
    specs = [program.weights[name] for name in exported.sources]
    small = [spec for spec in specs if spec.torch_dtype in _INDEX_DTYPES and spec.nbytes <= _INLINE_BYTES]
    devices: tuple[dict[str, onnx.TensorProto], ...] = tuple({} for _ in range(program.degree))
    for spec, lane, local in lane_parts(program, small, read):
        stored = _stored(exported, spec.name, local).contiguous()
        devices[lane][spec.name] = onnx.numpy_helper.from_array(stored.numpy(), spec.name)
    return devices


def _layout(weights: Mapping[str, onnx_ir.Value], shared: Collection[str]) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    ends = {True: 0, False: 0}
    for name, value in weights.items():
        assert value.shape is not None
        assert value.dtype is not None
        nbytes = int(value.dtype.itemsize * torch.Size(value.shape.numpy()).numel())
        alignment = PAGE if nbytes >= PAGE else _SMALL_ALIGNMENT
        offset = -(-ends[name in shared] // alignment) * alignment
        places[name] = _Place(value, name in shared, offset, nbytes)
        ends[name in shared] = offset + nbytes
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


def _finish(
    same: onnx.ModelProto,
    lane: int,
    places: Mapping[str, _Place],
    own: Sequence[onnx.TensorProto],
    hashes: Mapping[str, str],
    path: Path,
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(same)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.external_data.add(key="location", value=places[tensor.name].file(lane))
    proto.graph.initializer.extend(own)
    for key, value in ((META_LANE, str(lane)), *hashes.items()):
        proto.metadata_props.add(key=key, value=value)
    with naming(path):
        path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=False)
