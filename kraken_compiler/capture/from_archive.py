"""Capture a `torch.export.save` archive."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import IO

from torch.export import ExportedProgram

from kraken_compiler import _torch_compat as compat
from kraken_compiler.capture.archive_safety import inspect_archive
from kraken_compiler.capture.build_program import build_program
from kraken_compiler.capture.captured_model import Capture, Origin, digest_files
from kraken_compiler.capture.export_module import functionalize
from kraken_compiler.capture.quiet import quiet_torch
from kraken_compiler.capture.run_source import exported_reference
from kraken_compiler.errors import InputFileError, first_line
from kraken_compiler.weights.store import MemoryStore


def capture_archive(path: Path, *, trust_pickle: bool = False) -> Capture:
    """Capture the exported program in an archive; its weights are held in memory once.

    Args:
        path: The archive, whatever its name ends in.
        trust_pickle: Accept entries that can run code when they are opened.

    Raises:
        InputFileError: The archive is damaged, holds no single program, or is not trusted.
        UnsupportedModelError: The program has inputs or outputs that are no tensors.
    """
    with path.open("rb") as file:
        for module in inspect_archive(file, path, trust_pickle=trust_pickle):
            _import(module, path)
        file.seek(0)
        original = _load(file, path)
    reference = exported_reference(original)
    exported = functionalize(original)
    model_class = _model_class(exported)
    program, notes = build_program(exported, model_class=model_class)
    origin = Origin("export", str(path), model_class, digest=lambda: digest_files((path,)))
    return Capture(program, MemoryStore(exported.state_dict), origin, None, notes, reference)


def _import(module: str, path: Path) -> None:
    """Output classes register their structure with torch when their module is imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputFileError(f"{path} returns a class of {module}, which is not installed") from error


def _load(file: IO[bytes], path: Path) -> ExportedProgram:
    try:
        with quiet_torch():
            programs = compat.load_archive(file)
    except Exception as error:
        # torch's deserializer raises whatever its asserts and lookups raise on a damaged archive.
        reason = first_line(error)
        raise InputFileError(f"{path} cannot be read as a torch.export archive: {reason}") from error
    if len(programs) != 1 and "model" not in programs:
        raise InputFileError(f"{path} holds {len(programs)} exported programs ({', '.join(programs)}), expected one")
    return programs["model"] if "model" in programs else next(iter(programs.values()))


def _model_class(exported: ExportedProgram) -> str:
    """Class of the outermost module, from the first node that remembers where it came from."""
    for node in exported.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if not path:
                return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return ""
