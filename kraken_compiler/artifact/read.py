"""Opens an artifact: understands its manifest, and trusts a file only when its size and hash are the manifest's."""

from __future__ import annotations

import hashlib
import json
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
from kraken_compiler.errors import InputFileError


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
        """Where a file of the artifact is.

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
        content = json.loads(self.path(REPORT_FILE).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content

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
            try:
                with self.path(name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise InputFileError(f"{self.directory / name}: cannot be read: {error.strerror or error}") from error
            if found != self.manifest.files[name].sha256:
                raise InputFileError(f"{self.directory / name}: changed since it was written (its hash differs)")

    def _verify_size(self, name: str) -> None:
        path = self.path(name)
        expected = self.manifest.files[name].bytes
        try:
            found = path.stat().st_size
        except OSError as error:
            raise InputFileError(f"{path}: missing from the artifact ({error.strerror or error})") from error
        if found != expected:
            what = "truncated" if found < expected else "longer than written"
            raise InputFileError(f"{path}: {what} ({found:,} bytes, the manifest says {expected:,})")


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{directory}: no artifact here ({MANIFEST_FILE}: {error.strerror or error})") from error
    except ValueError as error:
        raise InputFileError(f"{path}: damaged, not JSON ({error})") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputFileError(
            f"{path}: format version {version!r}, this version reads {FORMAT_VERSION}; compile the model again"
        )
    try:
        # JSON has no tuples, so only JSON mode may turn its lists into ours.
        manifest = Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise InputFileError(f"{path}: {_first_problem(error)}") from error
    artifact = Artifact(directory, manifest)
    artifact.verify_sizes()
    if verify:
        artifact.verify()
    return artifact


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"])) or "the whole"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key '{place}'"
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    return f"'{place}': {problem['msg']}{more}"
