"""Writes an artifact: complete or not at all."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError

from kraken_compiler.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REPORT_FILE,
    TOKENIZER_DIRECTORY,
    AssignmentRecord,
    CacheRecord,
    FileRecord,
    HealingRecord,
    Manifest,
    RowsRecord,
    Source,
    SplitRecord,
)
from kraken_compiler.artifact.reservation import Reservation, reserved
from kraken_compiler.artifact.version import own_version
from kraken_compiler.backends.base import Backend
from kraken_compiler.errors import InputFileError, naming
from kraken_compiler.ir.program import CachedProgram, LaneProgram
from kraken_compiler.ir.schedule import Window
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.progress import Advance
from kraken_compiler.text import json_text
from kraken_compiler.weights.io.safetensors_format import byte_view
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY
from kraken_compiler.weights.shard_journal import JOURNAL, Mark, finished_files

Check = Callable[[Path], Mapping[str, Any]]
"""Checks an artifact directory; raises if it must not be used."""


TokenizerSaver = Callable[[Path], None]
"""Saves a tokenizer's files into a directory, which exists and is empty."""


def write_artifact(
    program: LaneProgram,
    read: SourceReader,
    directory: Path | str,
    *,
    source: Source,
    backends: Sequence[Backend[Any]],
    digest: Callable[[], str] | None = None,
    tokenizer_saver: TokenizerSaver | None = None,
    report: Mapping[str, Any] | None = None,
    healed: Sequence[HealingRecord] = (),
    options: Mapping[str, Any] | None = None,
    check: Check | None = None,
    force: bool = False,
    resumable: bool = False,
    reservation: Reservation | None = None,
    progress: Advance | None = None,
) -> Path:
    """Write a lane program as an artifact.

    Everything goes to a directory beside the target, which takes its place when it is complete: whoever looks, even
    after the writer was killed, sees no artifact, the old one, or the new one.

    Args:
        program: The lane program.
        read: Gives a whole source tensor by name, one at a time.
        directory: The target; its parents are made if need be.
        source: Where the model came from.
        backends: Who writes programs, beside the lanes' weights.
        digest: Computes `source.sha256`, in another thread while the files are written; None leaves it as it is.
        tokenizer_saver: Saves the tokenizer, None if there is none.
        report: What to keep as `report.json`.
        healed: How the lanes were trained.
        options: What the compile was asked for.
        check: Runs on the complete artifact before anybody can see it; what it returns joins the report under
            "verification". If it raises, nothing is written.
        force: Replace a target that is not empty.
        resumable: `read` gives what is in `source`, nothing else: take over what a killed compile of it had finished.
        reservation: The right to write there, if it was taken before.
        progress: Told about long stages.

    Returns:
        The artifact's directory, absolute.

    Raises:
        UsageError: The target is not empty and `force` is not given, is no directory, or somebody else is writing it.
        InputFileError: A file cannot be written: read-only, full, or no directory can be there.
    """
    with nullcontext(reservation) if reservation is not None else reserved(directory, force) as target_reservation:
        try:
            report_values = dict(report or {})
            with _source_with_hash(target_reservation, program, source, digest, backends, resumable) as pending_source:
                manifest = _fill(
                    target_reservation.partial,
                    program,
                    read,
                    pending_source,
                    backends,
                    tokenizer_saver,
                    report_values,
                    healed,
                    options or {},
                    progress,
                )
            if check is not None:
                report_values["verification"] = check(target_reservation.partial)
                _write_report(target_reservation.partial, report_values, manifest)
            target_reservation.put_in_place()
        except (OSError, SafetensorError) as error:
            raise _write_error(target_reservation, error) from error
        return target_reservation.target


def _write_error(reservation: Reservation, error: OSError | SafetensorError) -> InputFileError:
    """The error of a failed write, with the name that the file would have had."""
    if not isinstance(error, OSError):
        return InputFileError(f"{reservation.target}: cannot be written: {error}")
    reason = error.strerror or error
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else reservation.partial
    if path.is_relative_to(reservation.partial):
        return InputFileError(
            f"{reservation.target / path.relative_to(reservation.partial)}: cannot be written: {reason}"
        )
    return InputFileError(f"{reservation.target}: cannot be written: {path}: {reason}")


@contextmanager
def _source_with_hash(
    reservation: Reservation,
    program: LaneProgram,
    source: Source,
    digest: Callable[[], str] | None,
    backends: Sequence[Backend[Any]],
    resumable: bool,
) -> Iterator[Callable[[], Source]]:
    """Prepare the directory, and hash the source while the block writes; gives a function that waits for the hash.

    Only what a killed compile left is not looked at before the hash is known.
    """

    def complete() -> Source:
        return source if digest is None else source.model_copy(update={"sha256": digest()})

    def complete_and_note() -> Source:
        hashed_source = complete()
        if resumable and hashed_source.sha256:
            reservation.note_key(_resume_key(program, hashed_source, backends))
        return hashed_source

    left_key = reservation.left_key if resumable else ""
    reservation.prepare(keep_shards=bool(left_key) and left_key == _resume_key(program, complete(), backends))
    with ThreadPoolExecutor(1, "hash-source") as pool:
        pending = pool.submit(complete_and_note)
        yield pending.result
        pending.result()


def _resume_key(program: LaneProgram, source: Source, backends: Sequence[Backend[Any]]) -> str:
    """A key of the values in the files: what a killed compile of the same key finished need not be made again."""
    total = hashlib.sha256()
    parts = (FORMAT_VERSION, own_version(), torch.__version__, source, program.degree)
    weights = tuple(program.weights.values())
    total.update(repr((*parts, weights, [(backend.name, backend.noted_options) for backend in backends])).encode())
    for name, tensor in sorted(program.constants.items()):
        total.update(name.encode())
        total.update(byte_view(tensor.cpu().contiguous()))
    return total.hexdigest()


def _fill(
    directory: Path,
    program: LaneProgram,
    read: SourceReader,
    source: Callable[[], Source],
    backends: Sequence[Backend[Any]],
    tokenizer_saver: TokenizerSaver | None,
    report: Mapping[str, Any],
    healed: Sequence[HealingRecord],
    options: Mapping[str, Any],
    progress: Advance | None,
) -> Manifest:
    windows: tuple[Window, ...] = program.windows
    lanes = directory / LANES_DIRECTORY
    lanes.mkdir(exist_ok=True)
    # Whoever takes the weights that are there comes after those that write all of them.
    for backend in sorted(backends, key=lambda backend: not backend.writes_all_weights):
        windows = backend.write(program, read, lanes, progress) or windows
    if tokenizer_saver is not None:
        tokenizer_directory = directory / TOKENIZER_DIRECTORY
        tokenizer_directory.mkdir(exist_ok=True)
        tokenizer_saver(tokenizer_directory)
    hashed_source = source()
    for backend in backends:
        backend.complete(program, hashed_source, directory)
    _write_durably(directory / REPORT_FILE, json_text(report, sort_keys=True))
    marks = finished_files(lanes)
    files = {
        path.relative_to(directory).as_posix(): _record(path, marks.get(path))
        for path in sorted(directory.rglob("*"))
        if not path.is_dir() and path.name != JOURNAL
    }
    cached = program.cached
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kraken_compiler=own_version(),
        torch=torch.__version__,
        source=hashed_source,
        degree=program.degree,
        forms=program.plan.forms,
        dtype=_main_dtype(program),
        inputs=program.inputs,
        call=program.call,
        weights=tuple(program.weights.values()),
        assignment=tuple(AssignmentRecord.of(branch, lanes) for branch, lanes in program.assignment.items()),
        layers=program.layers,
        plan=program.plan,
        windows=windows,
        cache=_cache_record(cached) if cached is not None else None,
        no_cache=program.no_cache,
        rows=RowsRecord(dims=program.rows.dims, plan=program.rows.plan) if program.rows is not None else None,
        no_rows=program.no_rows,
        backends={backend.name: backend.noted_options for backend in backends},
        options=options,
        has_tokenizer=tokenizer_saver is not None,
        healed=tuple(healed),
        files=files,
    )
    # Last, so that a directory with a manifest is a whole artifact.
    _write_durably(directory / MANIFEST_FILE, _as_json(manifest))
    return manifest


def _cache_record(cached: CachedProgram) -> CacheRecord:
    split = cached.split
    record = None if split is None else SplitRecord(inputs=cached.split_inputs, plan=split.plan, once=split.once)
    return CacheRecord(plan=cached.plan, inputs=cached.step.inputs, split=record, no_split=cached.no_split)


def _write_report(directory: Path, report: Mapping[str, Any], manifest: Manifest) -> None:
    """Replace the report of a complete artifact."""
    _write_durably(directory / REPORT_FILE, json_text(report, sort_keys=True))
    files = {**manifest.files, REPORT_FILE: _record(directory / REPORT_FILE)}
    _write_durably(directory / MANIFEST_FILE, _as_json(manifest.model_copy(update={"files": files})))


def _record(path: Path, mark: Mark | None = None) -> FileRecord:
    with naming(path), path.open("rb") as file:
        digest = mark.sha256 if mark is not None else hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    assert mark is None or size == mark.end, f"{path}: {size} bytes, {mark.end} were written"
    return FileRecord(sha256=digest, bytes=size)


def _write_durably(path: Path, text: str) -> None:
    with naming(path), path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _as_json(model: BaseModel) -> str:
    return model.model_dump_json(indent=1)


def _main_dtype(program: LaneProgram) -> str:
    nbytes_by_dtype: Counter[str] = Counter()
    for spec in program.weights.values():
        nbytes_by_dtype[spec.dtype] += spec.nbytes
    return nbytes_by_dtype.most_common(1)[0][0] if nbytes_by_dtype else ""
