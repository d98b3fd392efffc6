"""The model in a device file, checked before anything in it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import onnx
from google.protobuf.message import DecodeError

from kraken_compiler.backends.onnx_ort.format import (
    DOMAIN,
    DOMAIN_VERSION,
    FORMAT_VERSION,
    META_CACHE,
    META_COLLECTIVES,
    META_DEGREE,
    META_FILES,
    META_FORMAT,
    META_FORMS,
    META_LANE,
    META_POSITIONS,
    META_PROGRAM,
    META_SIZES,
    META_WEIGHTS,
    OPSET,
    OWN,
    PRODUCT_ACCURACY,
    QUANTIZED_PRODUCT,
    WEIGHT_KINDS,
    CacheRecord,
    weight_files,
)
from kraken_compiler.errors import InputFileError, os_errors_as
from kraken_compiler.ir.size_rules import parse_rule

CACHE_DTYPES = ("float32", "float16")

NEWEST_OPSET = 26
"""The newest opset that was checked; a later one may have changed what an op means."""


@dataclass(frozen=True)
class DeviceModel:
    """One device's model, without its weights.

    Attributes:
        path: The file; the weights lie beside it.
        proto: The model.
        lane, degree: Which device of how many it is for.
        forms: Form of every layer.
        program: Hash of what all devices of a compile share.
        caches: Its KV caches in the order of the layers; None if it keeps none.
        positions: The longest sequence that it takes; None if nothing bounds it.
        collectives: One of `format.COLLECTIVE_KINDS`.
        weights: One of `format.WEIGHT_KINDS`; None if they are of the model's own type.
        sizes: What its sizes must keep to, see `ir/size_rules.py`; with caches, those of whole sequences.
        shapes: What the dims of the inputs are called there; with caches, nothing.
    """

    path: Path
    proto: onnx.ModelProto
    lane: int
    degree: int
    forms: tuple[str, ...]
    program: str
    caches: tuple[CacheRecord, ...] | None
    positions: int | None
    collectives: str = OWN
    weights: str | None = None
    sizes: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str, *, verify: bool = True) -> Self:
        """Read a device file.

        Args:
            path: The file.
            verify: Hash the weights and compare; the sizes are looked at in any case.

        Raises:
            InputFileError: It is missing, truncated, tampered with, no device file, or of another version.
        """
        path = Path(path)
        try:
            proto = onnx.load_model(str(path), load_external_data=False)
        except OSError as error:
            raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (DecodeError, ValueError) as error:
            raise InputFileError(f"{path}: damaged, not an ONNX model ({error})") from error
        try:
            return cls._from_proto(path, proto, verify)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            # What is no text in a text field comes as bytes, or fails when it is looked at.
            reason = " ".join(str(error).split())
            raise InputFileError(f"{path}: damaged, its description is incomplete ({reason})") from error

    @classmethod
    def _from_proto(cls, path: Path, proto: onnx.ModelProto, verify: bool) -> Self:
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        _check_versions(path, proto, metadata)
        caches = json.loads(metadata.get(META_CACHE, "null"))
        sizes = json.loads(metadata.get(META_SIZES, "{}"))
        model = cls(
            path=path,
            proto=proto,
            lane=int(metadata[META_LANE]),
            degree=int(metadata[META_DEGREE]),
            forms=tuple(json.loads(metadata[META_FORMS])),
            program=metadata[META_PROGRAM],
            caches=tuple(CacheRecord(**record) for record in caches) if caches is not None else None,
            positions=json.loads(metadata.get(META_POSITIONS, "null")),
            collectives=metadata.get(META_COLLECTIVES, OWN),
            weights=metadata.get(META_WEIGHTS),
            sizes=tuple(sizes.get("rules", ())),
            shapes={name: tuple(shape) for name, shape in sizes.get("shapes", {}).items()},
        )
        _check_description(model)
        if model.weights is not None and model.weights not in WEIGHT_KINDS:
            raise InputFileError(
                f"{path}: its weights are {model.weights!r}; this version knows {' and '.join(WEIGHT_KINDS)}"
            )
        hashes = json.loads(metadata[META_FILES])
        _check_places(path, proto)
        _check_data(model, hashes, verify)
        return model

    def with_exact_products(self) -> DeviceModel:
        """The model with products that round quantized weights only, as slow as that may be."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for node in proto.graph.node:
            if node.op_type == QUANTIZED_PRODUCT:
                attributes = [attribute for attribute in node.attribute if attribute.name != PRODUCT_ACCURACY]
                del node.attribute[:]
                node.attribute.extend(attributes)
        return replace(self, proto=proto)


def _check_versions(path: Path, proto: onnx.ModelProto, metadata: dict[str, str]) -> None:
    if META_FORMAT not in metadata:
        raise InputFileError(f"{path}: not a device file of kraken-compile")
    if metadata[META_FORMAT] != str(FORMAT_VERSION):
        raise InputFileError(
            f"{path}: device file format {metadata[META_FORMAT]!r}, this version reads {FORMAT_VERSION}; "
            "compile the model again"
        )
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if not OPSET <= opset <= NEWEST_OPSET:
        raise InputFileError(f"{path}: its opset is {opset}; this version runs {OPSET} to {NEWEST_OPSET}")
    if versions.get(DOMAIN, DOMAIN_VERSION) != DOMAIN_VERSION:
        raise InputFileError(
            f"{path}: its collectives are of version {versions[DOMAIN]}; this version runs {DOMAIN_VERSION}"
        )


def _check_description(model: DeviceModel) -> None:
    """Make sure that the model's description is possible.

    Raises:
        ValueError, TypeError: It is not.
    """
    if not 0 <= model.lane < model.degree:
        raise ValueError(f"device {model.lane} of {model.degree}")
    if not all(isinstance(form, str) for form in model.forms):
        raise TypeError("forms are names")
    if model.positions is not None and (type(model.positions) is not int or model.positions < 1):
        raise ValueError("the longest sequence is a positive number")
    for rule in model.sizes:
        if not isinstance(rule, str):
            raise TypeError("rules for sizes are text")
        parse_rule(rule)
    for cache in model.caches or ():
        sizes = (cache.heads, cache.key_dim, cache.value_dim)
        if not all(type(size) is int and size > 0 for size in sizes) or cache.dtype not in CACHE_DTYPES:
            raise ValueError(f"no cache is like {cache}")


def _check_places(path: Path, proto: onnx.ModelProto) -> None:
    """Make sure that only weights of the graph itself lie in another file: nobody looks where others would lie."""
    nodes = [node for function in proto.functions for node in function.node]
    graphs = [proto.graph, *(part.initialization for part in proto.training_info)]
    graphs += [part.algorithm for part in proto.training_info]
    tensors: list[onnx.TensorProto] = []
    while graphs:
        graph = graphs.pop()
        if graph is not proto.graph:
            tensors += graph.initializer
        tensors += (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                tensors += (attribute.t, *attribute.tensors)
                sparse_tensors = (attribute.sparse_tensor, *attribute.sparse_tensors)
                tensors += (part for sparse in sparse_tensors for part in (sparse.values, sparse.indices))
                graphs += ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data for tensor in tensors):
        raise InputFileError(f"{path}: refused: a constant of it lies in another file")


def _check_data(model: DeviceModel, hashes: Mapping[str, str], verify: bool) -> None:
    """Make sure that the weights are there, beside the file and nowhere else, and whole.

    Args:
        model: The device file.
        hashes: Of the files beside it, by name.
        verify: Compare them.
    """
    path = model.path
    ends: dict[str, int] = {}
    for tensor in model.proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        try:
            offset, length = int(entries.get("offset", "0")), int(entries["length"])
            if offset < 0 or length < 0:
                raise ValueError("before the file's beginning")
        except (KeyError, ValueError):
            raise InputFileError(f"{path}: damaged, weight '{tensor.name}' is nowhere") from None
        if name not in weight_files(model.lane):
            reason = "outside its folder" if Path(name).name != name else "which is no file of this device's"
            raise InputFileError(f"{path}: refused: weight '{tensor.name}' is said to be at '{name}', {reason}")
        ends[name] = max(ends.get(name, 0), offset + length)
    for name, end in ends.items():
        data = path.parent / name
        with os_errors_as(f"{data}: cannot be read"):
            if data.is_symlink() or not data.is_file():
                raise InputFileError(f"{data}: missing; it holds weights of {path.name}")
            if data.stat().st_size < end:
                raise InputFileError(f"{data}: truncated, {data.stat().st_size} bytes instead of {end}")
            if verify:
                with data.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != hashes[name]:
                    raise InputFileError(f"{data}: not what {path.name} was written with (its hash differs)")
