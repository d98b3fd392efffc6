"""Writes an artifact: complete or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import Tensor

from kraken_compiler.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REPORT_FILE,
    TOKENIZER_DIRECTORY,
    CacheRecord,
    FileRecord,
    HealingRecord,
    Manifest,
    Source,
)
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.formatting import json_text
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.schedule import Window
from kraken_compiler.progress import Advance

Check = Callable[[Path], Mapping[str, Any]]
"""Checks an artifact directory; raises if it must not be used."""


class Emitter(Protocol):
    """What an artifact asks of a backend (`backends.base.Backend`)."""

    @property
    def name(self) -> str:
        """Name of its directory in the artifact."""
        ...

    def write(
        self,
        program: Program,
        read: Callable[[str], Tensor],
        directory: Path,
        progress: Advance | None = None,
    ) -> tuple[Window, ...]:
        """Write one program per lane; see `Backend.write`."""
        ...


TokenizerSaver = Callable[[Path], None]
"""Saves a tokenizer's files into a directory, which exists and is empty."""


def write_artifact(
    program: Program,
    read: Callable[[str], Tensor],
    directory: Path | str,
    *,
    source: Source,
    backends: Sequence[Emitter],
    tokenizer_saver: TokenizerSaver | None = None,
    report: Mapping[str, Any] | None = None,
    healed: Sequence[HealingRecord] = (),
    check: Check | None = None,
    force: bool = False,
    progress: Advance | None = None,
) -> Path:
    """Write a lane program as an artifact.

    Everything goes to a directory beside the target, which is renamed into place when it is complete: whoever looks
    sees no artifact, the old one, or the new one.

    Args:
        program: The lane program.
        read: Gives a whole source tensor by name, one at a time.
        directory: The target; its parents are made if need be.
        source: Where the model came from.
        backends: Who writes programs, each into a directory of its name.
        tokenizer_saver: Saves the tokenizer, None if there is none.
        report: What to keep as `report.json`.
        healed: How the lanes were trained.
        check: Runs on the complete artifact before anybody can see it; what it returns joins the report under
            "verification". If it raises, nothing is written.
        force: Replace a target that is not empty.
        progress: Told about long stages.

    Returns:
        The artifact's directory, absolute.

    Raises:
        UsageError: The target is not empty and `force` is not given, or is no directory.
        InputFileError: The target cannot be written: read-only, full, or no directory can be there.
    """
    target = Path(directory).absolute()
    check_target(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
    except OSError as error:
        raise InputFileError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        kept = dict(report or {})
        manifest = _fill(partial, program, read, source, backends, tokenizer_saver, kept, healed, progress)
        if check is not None:
            kept["verification"] = check(partial)
            _write_report(partial, kept, manifest)
        _move_into_place(partial, target)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputFileError(f"{target}: cannot be written: {reason}") from error
    finally:
        # Also after Ctrl-C: a complete artifact is no longer here, an incomplete one is of no use.
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_target(directory: Path | str, force: bool = False) -> None:
    """Make sure that an artifact may be written here; worth asking before hours of work.

    Raises:
        UsageError: It is no directory, or not empty and `force` is not given.
        InputFileError: It cannot be looked into.
    """
    target = Path(directory)
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise UsageError(f"{target} exists and is no directory")
        occupied = any(target.iterdir())
    except OSError as error:
        raise InputFileError(f"{target}: cannot be written: {error.strerror or error}") from error
    if occupied and not force:
        raise UsageError(f"{target} is not empty; choose another directory, or replace it with --force")


def _fill(
    directory: Path,
    program: Program,
    read: Callable[[str], Tensor],
    source: Source,
    backends: Sequence[Emitter],
    tokenizer_saver: TokenizerSaver | None,
    report: Mapping[str, Any],
    healed: Sequence[HealingRecord],
    progress: Advance | None,
) -> Manifest:
    windows: tuple[Window, ...] = program.windows
    for backend in backends:
        own = directory / backend.name
        own.mkdir()
        windows = backend.write(program, read, own, progress) or windows
    if tokenizer_saver is not None:
        own = directory / TOKENIZER_DIRECTORY
        own.mkdir()
        tokenizer_saver(own)
    _write_durably(directory / REPORT_FILE, json_text(report, sort_keys=True))
    files = {
        path.relative_to(directory).as_posix(): _record(path)
        for path in sorted(directory.rglob("*"))
        if not path.is_dir()
    }
    cached = program.cached
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kraken_compiler=_own_version(),
        torch=torch.__version__,
        source=source,
        degree=program.degree,
        forms=program.plan.forms if program.plan is not None else (),
        dtype=_main_dtype(program),
        inputs=program.inputs,
        call=program.call,
        weights=tuple(program.weights.values()),
        layers=program.layers,
        plan=program.plan,
        windows=windows,
        cache=CacheRecord(plan=cached.plan, inputs=cached.step.inputs) if cached is not None else None,
        no_cache=program.no_cache,
        backends=tuple(backend.name for backend in backends),
        has_tokenizer=tokenizer_saver is not None,
        healed=tuple(healed),
        files=files,
    )
    # Last, so that a directory with a manifest is a whole artifact.
    _write_durably(directory / MANIFEST_FILE, _as_json(manifest))
    return manifest


def _write_report(directory: Path, report: Mapping[str, Any], manifest: Manifest) -> None:
    """Replace the report of a complete artifact."""
    _write_durably(directory / REPORT_FILE, json_text(report, sort_keys=True))
    files = {**manifest.files, REPORT_FILE: _record(directory / REPORT_FILE)}
    _write_durably(directory / MANIFEST_FILE, _as_json(manifest.model_copy(update={"files": files})))


def _move_into_place(partial: Path, target: Path) -> None:
    """Put a complete directory where an old one may be; if that fails, the old one is back."""
    if not target.exists():
        partial.rename(target)
    else:
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_directory(target.parent)


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return FileRecord(sha256=digest, bytes=path.stat().st_size)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(model: BaseModel) -> str:
    return model.model_dump_json(indent=1)


def _main_dtype(program: Program) -> str:
    counted: Counter[str] = Counter()
    for spec in program.weights.values():
        counted[spec.dtype] += spec.nbytes
    return counted.most_common(1)[0][0] if counted else ""


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kraken-compiler")
    except PackageNotFoundError:
        return "unknown"
