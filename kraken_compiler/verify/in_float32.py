"""An artifact whose lanes compute in float32 what they compute in half precision, for a check alone.

A pretrained model of which a form changes the function can be so ill-conditioned that half precision shows nothing: its
rounding moves the results as far as a wrong program would. The same graphs with float32 in the place of every half
type, on the same weights, round tens of thousands of times finer, and what is wired wrongly stays wrong in them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from kraken_compiler.artifact.manifest import MANIFEST_FILE, FileRecord
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.passes.shapes import refresh_shapes
from kraken_compiler.text import json_text
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY

_HALVES = (torch.float16, torch.bfloat16)
_NAMES = frozenset(str(dtype).removeprefix("torch.") for dtype in _HALVES)
_WHOLE = "float32"

_MOST_BYTES = 16 << 30
"""Lanes of more than this are not written once more."""


def can_be_in_float32(artifact: Artifact) -> bool:
    """True if an artifact's lanes compute in half precision, and are small enough to be written once more."""
    lanes = [record.bytes for name, record in artifact.manifest.files.items() if _is_of_lanes(name)]
    dtypes = {spec.dtype for spec in artifact.manifest.weights}
    return bool(lanes) and sum(lanes) <= _MOST_BYTES and not dtypes.isdisjoint(_NAMES)


@contextmanager
def in_float32(artifact: Artifact, backend: str) -> Iterator[Artifact]:
    """The lanes of an artifact in float32, as an artifact of its own that is gone at the end.

    Args:
        artifact: An artifact whose lanes can be.
        backend: The backend whose program it holds; one whose files are all of lanes.
    """
    with tempfile.TemporaryDirectory(prefix="kraken-float32-") as place:
        directory = Path(place)
        (directory / LANES_DIRECTORY).mkdir()
        files = {}
        for name in filter(_is_of_lanes, artifact.manifest.files):
            _write_in_float32(artifact.path(name), directory / name)
            files[name] = _record(directory / name)
        manifest = _with_float32(artifact.manifest.model_dump(mode="json"))
        manifest |= {
            "files": files,
            "backends": {backend: manifest["backends"][backend]},
            "has_tokenizer": False,
        }
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        yield open_artifact(directory, verify=False)


def program_in_float32(program: LaneProgram) -> LaneProgram:
    """A lane program with float32 in the place of every half type, without what is made of it (its KV cache)."""
    copy = replace(program.copy(), cached=None, rows=None)
    has_shapes = all("val" in node.meta for node in copy.graph.find_nodes(op="placeholder"))  # none out of a file has
    for node in copy.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(part, _whole_type) for part in (node.args, node.kwargs))
        value = node.meta.pop("val", None)
        if has_shapes and node.op == "placeholder":
            node.meta["val"] = value.float() if value.dtype in _HALVES else value
    if has_shapes:
        refresh_shapes(copy.graph)
    copy.module.recompile()
    weights = {name: replace(spec, dtype=_with_float32(spec.dtype)) for name, spec in copy.weights.items()}
    inputs = tuple(replace(spec, dtype=_with_float32(spec.dtype)) for spec in copy.inputs)
    return replace(copy, weights=weights, inputs=inputs)


def _whole_type(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in _HALVES else argument


def _is_of_lanes(name: str) -> bool:
    return name.startswith(f"{LANES_DIRECTORY}/")


def _write_in_float32(source: Path, target: Path) -> None:
    if source.suffix == ".json":
        target.write_text(json_text(_with_float32(json.loads(source.read_text(encoding="utf-8")))), encoding="utf-8")
        return
    tensors = load_file(source)
    save_file({name: value.float() if value.dtype in _HALVES else value for name, value in tensors.items()}, target)


def _with_float32(data: Any) -> Any:
    """A JSON document with float32 in the place of every half type's name."""
    if isinstance(data, dict):
        return {key: _with_float32(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_float32(value) for value in data]
    return _WHOLE if isinstance(data, str) and data in _NAMES else data


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, bytes=path.stat().st_size).model_dump()
