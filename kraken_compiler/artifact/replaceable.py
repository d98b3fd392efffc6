"""Check that a new artifact may replace a directory: an empty one, or an artifact that holds nothing else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from kraken_compiler.artifact.manifest import MANIFEST_FILE
from kraken_compiler.artifact.read import MAX_MANIFEST_BYTES, MEASURED_FILE
from kraken_compiler.errors import InputFileError, UsageError

_MOST_NAMES = 3


def resolved(directory: Path | str) -> Path:
    """The directory itself, behind all links, which stay what they are.

    Raises:
        UsageError: A link leads back to itself, or no path can have such a name.
        InputFileError: It cannot be looked for.
    """
    try:
        target = Path(os.path.realpath(directory))
        is_loop = target.is_symlink()
    except ValueError as error:  # a NUL character
        raise UsageError(f"{str(directory)!r} is no path: {error}") from error
    except OSError as error:
        raise InputFileError(f"{directory}: cannot be written: {error.strerror or error}") from error
    if is_loop:
        raise UsageError(f"{directory}: a link that leads back to itself; choose another directory")
    return target


def require_replaceable(directory: Path, inputs: Sequence[Path]) -> None:
    """Make sure that nothing is lost when an artifact takes the place of a directory.

    Args:
        directory: It exists, and is no link.
        inputs: Files and directories that the artifact is made from.

    Raises:
        UsageError: Something would be; names it.
        OSError: It cannot be looked into.
    """
    status = directory.stat()
    advice = "choose another directory"
    for path in inputs:
        if _holds(status, path):
            raise UsageError(f"{directory} is or holds {path}, which is read, and is not replaced; {advice}")
    if _holds(status, Path()):
        raise UsageError(f"{directory} is or holds the working directory, and is not replaced; {advice}")
    if directory.is_mount():
        raise UsageError(f"{directory} is a mount point, and cannot be replaced; choose a directory in it")
    others = foreign_entries(directory)
    if others:
        more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
        names = ", ".join(others[:_MOST_NAMES]) + more
        raise UsageError(f"{directory} is not empty and holds {names}, which no compile wrote; {advice}")


def foreign_entries(directory: Path) -> list[str]:
    """Entries of a directory beside the files of an artifact, by path inside it; folders end in a slash.

    Raises:
        OSError: It cannot be looked into.
    """
    files = _files_of_artifact(directory / MANIFEST_FILE)
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    entries = []
    for folder, subfolders, names in os.walk(directory, onerror=_raise):
        inside = Path(folder).relative_to(directory)
        for name in list(subfolders):
            if (inside / name).as_posix() not in folders or Path(folder, name).is_symlink():
                subfolders.remove(name)
                entries.append(f"{(inside / name).as_posix()}/")
        for name in names:
            if (inside / name).as_posix() not in files or not stat.S_ISREG(Path(folder, name).lstat().st_mode):
                entries.append((inside / name).as_posix())
    return sorted(entries)


def _raise(error: OSError) -> None:
    raise error


def _files_of_artifact(manifest: Path) -> frozenset[str]:
    """Names of an artifact's files, also one of another version; none if that is no artifact's manifest."""
    try:
        if not stat.S_ISREG(manifest.lstat().st_mode) or manifest.stat().st_size > MAX_MANIFEST_BYTES:
            return frozenset()
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return frozenset()
    if not isinstance(content, dict):
        return frozenset()
    version, files = content.get("format_version"), content.get("files")
    if not isinstance(version, int) or not isinstance(content.get("kraken_compiler"), str):
        return frozenset()
    if not isinstance(files, dict) or not all(_is_record(record) for record in files.values()):
        return frozenset()
    return frozenset([*files, MANIFEST_FILE, MEASURED_FILE])


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and {"sha256", "bytes"} <= record.keys()


def _holds(directory: os.stat_result, path: Path) -> bool:
    """True if a path is a directory, or lies in it, by whatever name both are called."""
    try:
        place = Path(os.path.realpath(path))
    except (FileNotFoundError, ValueError):
        return False  # the working directory was removed, or no path is called like that
    for above in (place, *place.parents):
        try:
            if os.path.samestat(directory, above.stat()):
                return True
        except OSError:
            continue  # what is not there, or cannot be reached, is no part of it
    return False
