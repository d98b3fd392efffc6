"""The lane graph as a file: a `torch.export` archive without weights and without pickles.

Writing is torch's own; any torch reads it back with `torch.export.load`. Reading is ours, because a rank must start
fast and trust nothing: torch's loader rebuilds a symbolic shape for every value (12 s for 3,000 nodes, ours 0.1 s),
unpickles what it finds, and evaluates size expressions as Python. Ours reads the JSON of the graph and nothing else,
and resolves ops by name only in the namespaces that a lane program may use.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from torch import fx

from kraken_compiler._torch_compat import flat_archive
from kraken_compiler.backends.torch_dist.archive_graph import SCHEMA_MAJOR, UnknownGraphError, graph_from_json
from kraken_compiler.errors import InputFileError
from kraken_compiler.file_errors import naming
from kraken_compiler.ir.program import Program

_GRAPH_ENTRY = "models/model.json"
_SMALL_ENTRIES = frozenset(
    {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
)
_EMPTY_ENTRIES = frozenset({"data/sample_inputs/model.pt"})
_CONFIG_ENTRIES = frozenset({"data/weights/model_weights_config.json", "data/constants/model_constants_config.json"})


def save_graph(program: Program, path: Path) -> fx.GraphModule:
    """Write the program's graph, without weights.

    Returns:
        The graph as it was read back; its nodes run in the order of the program's.

    Raises:
        OSError: The file cannot be written; names it.
    """
    graph = program.copy().graph
    foreign = [node.name for node in graph.nodes if node.op not in ("placeholder", "call_function", "output")]
    assert not foreign, f"a lane graph holds ops only, found {foreign[:3]}"
    for node in graph.nodes:
        # Stack traces and module paths name the user's files; neither belongs in a distributable artifact.
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    with naming(path):
        path.write_bytes(flat_archive(graph))
    written = load_graph(path)
    expected, found = node_order(program.module), node_order(written)
    assert expected == found, f"saving changed the order of the nodes: {_first_difference(expected, found)}"
    return written


def load_graph(path: Path) -> fx.GraphModule:
    """Read a graph that `save_graph` wrote: same placeholders, same nodes in the same order, no metadata.

    Raises:
        InputFileError: The file is missing, damaged, holds anything but a graph, or calls an op no lane program calls.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = json.loads(archive.read(_checked_graph_entry(archive, path)))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, KeyError, struct.error) as error:
        raise InputFileError(f"{path}: damaged, not a torch.export archive ({error})") from error
    try:
        version = content["schema_version"]["major"]
        if version != SCHEMA_MAJOR:
            raise InputFileError(
                f"{path}: graph schema {version!r}, this version reads {SCHEMA_MAJOR}; compile the model again"
            )
        return fx.GraphModule({}, graph_from_json(content["graph_module"]["graph"]))
    except UnknownGraphError as error:
        raise InputFileError(f"{path}: refused: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, SyntaxError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputFileError(f"{path}: damaged graph ({reason[:200]})") from error


def node_order(module: fx.GraphModule) -> list[tuple[str, Any]]:
    """What the graph runs, in order: placeholders by name, calls by target.

    Element accesses are left out: a file keeps them with their producer.
    """
    return [
        (node.op, node.name if node.op == "placeholder" else str(node.target))
        for node in module.graph.nodes
        if getattr(node.target, "__name__", "") != "getitem"
    ]


def _checked_graph_entry(archive: zipfile.ZipFile, path: Path) -> str:
    """The name of the graph's entry, after making sure that the archive holds nothing that could be a pickle."""
    graph_entry = ""
    for entry in archive.infolist():
        # Torch stores; what is compressed could be any size when it is read.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputFileError(f"{path}: refused: '{entry.filename}' is compressed")
        inner = entry.filename.partition("/")[2]
        if inner == _GRAPH_ENTRY:
            graph_entry = entry.filename
        elif inner in _CONFIG_ENTRIES:
            if json.loads(archive.read(entry)) != {"config": {}}:
                raise InputFileError(f"{path}: refused: it carries tensors in '{inner}'; a lane graph has none")
        elif inner in _EMPTY_ENTRIES:
            if entry.file_size:
                raise InputFileError(f"{path}: refused: '{inner}' is not empty and would have to be unpickled")
        elif inner not in _SMALL_ENTRIES:
            raise InputFileError(f"{path}: refused: unexpected entry '{entry.filename}'; a lane graph has none")
    if not graph_entry:
        raise InputFileError(f"{path}: holds no graph")
    return graph_entry


def _first_difference(expected: list[Any], found: list[Any]) -> str:
    for position, (left, right) in enumerate(zip(expected, found)):
        if left != right:
            return f"at {position} expected {left}, found {right}"
    return f"{len(expected)} nodes expected, {len(found)} found"
