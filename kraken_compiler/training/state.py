"""The folder of a run that is not finished: its settings, and the last checkpoint.

    OUT.heal/, OUT.train/
      state.json                    settings, step, what was evaluated, sha256 of the files that belong to the step
      step-100.rank-0.safetensors   trained weights, AdamW's moments, the random generator
      rows.safetensors, first/      what ranks read: token ids, and first weights; events.jsonl is what they say
      model/                        what comes of it, until it is checked
      lane-0.safetensors ...        the result, once all steps are done, with `shared.safetensors`

A file is written under another name, and renamed when it is whole; `state.json` names the others, and is replaced last.
So whenever the process is killed, one complete checkpoint is there. No pickles.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from kraken_compiler.errors import InputFileError, UsageError, os_errors_as
from kraken_compiler.training.settings import option_name

STATE_FILE = "state.json"
_VERSION = 1
_WITHOUT_VALUES = {
    "artifact": "another artifact",
    "source": "another source model",
    "model": "another model",
    "from": "another model to begin with",
    "teacher": "another teacher",
    "texts": "other texts",
    "rows": "other rows of tokens",
}
"""What has changed of a run, where the values themselves say nothing to people."""
_RUN_FILES = re.compile(
    r"(state\.json|step-\d+\.rank-\d+\.safetensors|lane-\d+\.safetensors|shared\.safetensors|rows\.safetensors)"
    r"(\.partial)?|lock|events\.jsonl|first|model|\.?teacher\.kraken(\.partial)?"
)
"""Names of all that a run puts into its folder."""


@dataclass(frozen=True)
class RunState:
    """Progress of a run.

    Attributes:
        identity: What it does; a run is only resumed to do the same.
        step: Number of steps that the checkpoint has behind it.
        files: sha256 of the checkpoint's files by name; none at step 0.
        before: What the held-out text showed before the first step; None if it was not evaluated yet.
        held_out: (step, objective) of every evaluation so far.
    """

    identity: dict[str, Any]
    step: int = 0
    files: dict[str, str] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    held_out: tuple[tuple[int, float], ...] = ()


def open_state(folder: Path, identity: Mapping[str, Any], restart: bool) -> RunState:
    """Begin a run, or find where an earlier part of it ended.

    Args:
        folder: The run's.
        identity: What the run does, plain values.
        restart: Drop what is there.

    Raises:
        UsageError: The folder holds a run that does something else, or no run at all.
        InputFileError: It cannot be read or written.
    """
    plain_identity = json.loads(json.dumps(identity))
    with os_errors_as(f"{folder}: cannot be written"):
        if folder.exists() and any(folder.iterdir()):
            if not (folder / STATE_FILE).exists():
                raise UsageError(f"{folder} is needed for checkpoints and holds something else; move it away")
            if not restart:
                state = read_state(folder)
                _require_same(folder, state.identity, plain_identity)
                return state
            others = sorted(path.name for path in folder.iterdir() if not _RUN_FILES.fullmatch(path.name))
            if others:
                raise UsageError(f"{folder} also holds {', '.join(others[:3])}, which no run wrote; move it away")
            with Lock(folder):
                remove_run(folder)
        elif folder.exists():
            folder.rmdir()
        # Renamed when it has a state, so that a folder without one is never ours.
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        state = RunState(plain_identity)
        write_state(partial, state)
        partial.rename(folder)
    return state


def remove_run(folder: Path) -> None:
    """Remove a run's files, and its folder if it holds nothing else."""
    for path in sorted(folder.iterdir()):
        if not _RUN_FILES.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def read_state(folder: Path) -> RunState:
    """Read the state that `write_state` wrote.

    Raises:
        InputFileError: It is missing or damaged.
    """
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if version != _VERSION:
            raise InputFileError(f"{path}: format version {version}, this version reads {_VERSION}; use --restart")
        held_out = tuple((int(step), float(kl)) for step, kl in content.pop("held_out"))
        return RunState(**content, held_out=held_out)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"{path}: damaged ({error}); begin anew with --restart") from error


def write_state(folder: Path, state: RunState) -> None:
    """Replace the state in one go.

    Raises:
        InputFileError: It cannot be written, e.g. because the disk is full; the old one is still there.
    """
    text = json.dumps({"format_version": _VERSION, **asdict(state)}, indent=1)
    write_whole(folder / STATE_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> bytes:
    """Write a file so that it is there completely or not at all; an old one is replaced.

    Returns:
        Its sha256.

    Raises:
        InputFileError: It cannot be written; nothing of it is left, and the old one is untouched.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            os.fsync(file.fileno())
        partial.rename(path)
    except (OSError, InputFileError) as error:
        partial.unlink(missing_ok=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputFileError(f"{path}: the checkpoint cannot be written: {reason}") from error
    return digest


def keep_only(folder: Path, state: RunState) -> None:
    """Remove the files of earlier checkpoints."""
    for path in folder.glob("step-*"):
        if _RUN_FILES.fullmatch(path.name) and path.name not in state.files:
            path.unlink(missing_ok=True)


def finished_step(state: RunState, step: int, files: Mapping[str, str]) -> RunState:
    """The state after a checkpoint."""
    return replace(state, step=step, files=dict(files))


class Lock:
    """Keeps a second process from working in the same folder; the system opens it when this process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        try:
            self._file = self._path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self._path.parent}: another run works on it") from error
        except OSError as error:
            raise InputFileError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()


def _require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(_change(name, before.get(name), now.get(name)) for name in names)
        raise UsageError(
            f"{folder} holds an unfinished run with other settings: {changes}; give the same ones to resume it, or "
            "begin anew with --restart"
        )


def _change(name: str, before: object, now: object) -> str:
    if name in _WITHOUT_VALUES:
        return _WITHOUT_VALUES[name]
    return f"{option_name(name)} was {_value_text(before)} and is {_value_text(now)}"


def _value_text(value: object) -> str:
    return "not given" if value is None else str(value)
