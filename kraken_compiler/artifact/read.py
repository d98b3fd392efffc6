"""Reader of artifacts: parses the manifest, and trusts a file only when its size and hash are the manifest's."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from kraken_compiler.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REPORT_FILE,
    TOKENIZER_DIRECTORY,
    Manifest,
)
from kraken_compiler.artifact.packed_sets import unpacked_manifest
from kraken_compiler.errors import InputFileError, os_errors_as
from kraken_compiler.weights.lane_file_names import LANES_DIRECTORY

MAX_MANIFEST_BYTES = 256 << 20
"""Largest manifest that is read: far more than any model's, and less than memory."""

MEASURED_FILE = "measured.json"
"""What runs measured on their machines; no compile wrote it, and nothing is computed otherwise for it."""

_COMPUTATION_FIELDS = {"format_version", "degree", "forms", "inputs", "call", "weights", "plan", "cache"}
"""The fields of a manifest that say what is computed, beside the files."""


@dataclass(frozen=True)
class Artifact:
    """An artifact directory whose manifest has been read.

    Attributes:
        directory: Where it is.
        manifest: What it says.
    """

    directory: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """The path of a file of the artifact.

        Raises:
            InputFileError: The manifest does not list it.
        """
        if name not in self.manifest.files:
            raise InputFileError(f"{self.directory}: the manifest lists no file '{name}'")
        return self.directory / name

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's directory, None if the model has none."""
        return self.directory / TOKENIZER_DIRECTORY if self.manifest.has_tokenizer else None

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Paths of the tokenizer's files inside the artifact."""
        return tuple(name for name in self.manifest.files if name.startswith(f"{TOKENIZER_DIRECTORY}/"))

    def report(self) -> dict[str, object]:
        """The compile report.

        Raises:
            InputFileError: It is missing or damaged.
        """
        self.verify(REPORT_FILE)
        path = self.path(REPORT_FILE)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputFileError(f"{path}: damaged, no report ({type(error).__name__})") from error
        if not isinstance(content, dict):
            raise InputFileError(f"{path}: damaged, no report")
        return content

    def fingerprint(self) -> str:
        """A hash of what the lanes' programs compute, wherever the artifact lies and whatever it was compiled from.

        Artifacts that differ in it must not be run together. It rests on the hashes in the manifest: the files
        themselves are checked by whoever reads them.
        """
        content = self.manifest.model_dump(mode="json", include=_COMPUTATION_FIELDS)
        files = self.manifest.files.items()
        content["files"] = {name: record.sha256 for name, record in files if name.startswith(f"{LANES_DIRECTORY}/")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def verify_sizes(self) -> None:
        """Make sure that every file is there in its full size; reads no contents.

        Raises:
            InputFileError: One is missing, shorter or longer.
        """
        for name in self.manifest.files:
            self._verify_size(name)

    def verify(self, *names: str) -> None:
        """Make sure that files hold what was written; all of them if none is named.

        Raises:
            InputFileError: One is missing, truncated or changed, or the manifest does not list it.
        """
        for name in names or tuple(self.manifest.files):
            self._verify_size(name)
            with os_errors_as(f"{self.directory / name}: cannot be read"), self.path(name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != self.manifest.files[name].sha256:
                raise InputFileError(f"{self.directory / name}: changed since it was written (its hash differs)")

    def _verify_size(self, name: str) -> None:
        path = self.path(name)
        expected = self.manifest.files[name].bytes
        size = _size(self.directory, path)
        if size != expected:
            fault = "truncated" if size < expected else "longer than written"
            raise InputFileError(f"{path}: {fault} ({size:,} bytes, the manifest says {expected:,})")


def open_artifact(directory: Path | str, verify: bool = True) -> Artifact:
    """Open an artifact directory.

    Args:
        directory: The artifact.
        verify: Also check the hash of every file. Sizes are always checked. A rank passes False and verifies only what
            it reads.

    Raises:
        InputFileError: No artifact, another format version, an unknown key, or a file that is missing, truncated or
            tampered with.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    try:
        if path.exists() and _size(directory, path) > MAX_MANIFEST_BYTES:
            raise InputFileError(f"{path}: damaged, no manifest is that large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{directory}: no artifact here ({MANIFEST_FILE}: {error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: damaged, not JSON ({error})") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputFileError(
            f"{path}: format version {version!r}, this version reads {FORMAT_VERSION}; compile the model again"
        )
    try:
        # JSON has no tuples, so only JSON mode may turn its lists into ours.
        manifest = Manifest.model_validate_json(json.dumps(unpacked_manifest(content)), strict=True)
    except ValidationError as error:
        raise InputFileError(f"{path}: {_first_problem(error)}") from error
    except ValueError as error:
        raise InputFileError(f"{path}: {error}") from error
    artifact = Artifact(directory, manifest)
    artifact.verify_sizes()
    if verify:
        artifact.verify()
    return artifact


def _size(directory: Path, path: Path) -> int:
    """Size of a file that is really there: a link could lead out of the artifact, and a pipe would never end.

    Raises:
        InputFileError: It is missing, or no plain file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputFileError(f"{path}: missing from the artifact ({error.strerror or error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputFileError(f"{path}: refused: no plain file")
    if Path(os.path.realpath(path)) != Path(os.path.realpath(directory)) / path.relative_to(directory):
        raise InputFileError(f"{path}: refused: a link, or behind one; an artifact holds its own files")
    return status.st_size


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"])) or "the whole"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return " ".join(f"unknown key '{place}'".split())
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    return " ".join(f"'{place}': {problem['msg']}{more}".split())
