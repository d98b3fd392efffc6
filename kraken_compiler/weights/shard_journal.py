"""The journal of shards while they are written, so that a killed compile need not begin anew.

One line of JSON for every source tensor whose parts are in the files, and one at the end:

    {"source": "model.embed_tokens.weight", "ends": [840, 840, 8504], "sha256": ["5fd9...", "02c4...", "7a11..."]}
    {"finished": {"lane-0.safetensors": {"sha256": "91ab...", "bytes": 4711}, ...}}

The hashes are of a file's beginning up to its end so far: one pass over the bytes gives all of them, the whole file's
too. A line is believed only after the file has been hashed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kraken_compiler.errors import naming

JOURNAL = "shards.journal"


@dataclass(frozen=True)
class Mark:
    """A position in a file, and the hash of the bytes before it.

    Attributes:
        end: Number of bytes before it.
        sha256: Their hash.
    """

    end: int
    sha256: str


class ShardJournal:
    """The journal of the shards of one directory.

    Args:
        directory: The shards' directory.

    Raises:
        OSError: It cannot be read or written; names it (from every method).
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL

    def marks(self, files: int) -> list[tuple[Mark, ...]]:
        """Marks of an earlier writer: one for each file, for every source tensor that it finished."""
        lines = []
        for line in _lines(self._path):
            ends, hashes = line.get("ends"), line.get("sha256")
            if not isinstance(ends, list) or not isinstance(hashes, list) or not len(ends) == len(hashes) == files:
                break
            if not all(isinstance(end, int) for end in ends):
                break
            lines.append(tuple(Mark(end, str(digest)) for end, digest in zip(ends, hashes)))
        return lines

    def restart(self, sources: Sequence[str], marks: Sequence[tuple[Mark, ...]]) -> None:
        """Begin anew with the marks that still match the files."""
        with naming(self._path):
            self._path.write_text("", encoding="utf-8")
        for source, file_marks in zip(sources, marks):
            self.add(source, file_marks)

    def add(self, source: str, marks: Sequence[Mark]) -> None:
        """Note that a source tensor's parts are in the files."""
        line = {"source": source, "ends": [mark.end for mark in marks], "sha256": [mark.sha256 for mark in marks]}
        self._append(line)

    def finish(self, files: Mapping[str, Mark]) -> None:
        """Note that the files are complete."""
        self._append({"finished": {name: {"sha256": mark.sha256, "bytes": mark.end} for name, mark in files.items()}})

    def _append(self, line: Mapping[str, object]) -> None:
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def finished_files(directory: Path) -> dict[Path, Mark]:
    """The files of a directory whose hashes are known from their writing."""
    marks: dict[Path, Mark] = {}
    for line in _lines(directory / JOURNAL):
        match line.get("finished"):
            case dict(files):
                for name, record in files.items():
                    match record:
                        case {"bytes": int(end), "sha256": str(digest)}:
                            marks[directory / name] = Mark(end, digest)
    return marks


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written whole."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    with naming(path):
        content = path.read_text(encoding="utf-8", errors="replace")
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # killed while it wrote this one
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
