"""The reservation of an artifact's path by one writer, and the directory where it grows until it is complete.

Beside `model.kraken` lies, as long as somebody writes it,

    .model.kraken.partial/
      lock          held by the writer; the system lets go of it when the writer ends, however it ends
      key           which values the finished shards hold
      artifact/     what becomes `model.kraken`
      old/          the artifact that was there, where the file system cannot swap two directories in one step

A compile that was killed leaves this directory; the next one finds the lock free and takes the directory over. Nothing
else is removed: a directory is replaced only if it is empty or an artifact alone, before the work and again after it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kraken_compiler.artifact.replaceable import require_replaceable, resolved
from kraken_compiler.artifact.swap_directories import exchange
from kraken_compiler.errors import UsageError, naming, os_errors_as
from kraken_compiler.weights.shard_journal import JOURNAL

_LOCK, _KEY, _ARTIFACT, _OLD = "lock", "key", "artifact", "old"
_NEW_KEY = f"{_KEY}.new"
_RESUMABLE_SUFFIXES = (JOURNAL, ".safetensors")
"""Suffixes of the names of files that a later compile can go on with: shards, and what is known of them."""


def check_target(directory: Path | str, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Make sure that an artifact may be written here; worth asking before hours of work.

    Args:
        directory: The artifact's.
        force: It may be there already.
        inputs: Files and directories that the artifact is made from.

    Raises:
        UsageError: It is no directory, or not empty and `force` is not given, or something would be lost with it.
        InputFileError: It cannot be looked into.
    """
    target = resolved(directory)
    with os_errors_as(f"{target}: cannot be written"):
        if not target.exists():
            return
        if not target.is_dir():
            raise UsageError(f"{target} exists and is no directory")
        require_replaceable(target, inputs)
        occupied = any(target.iterdir())
    if occupied and not force:
        raise UsageError(f"{target} is not empty; choose another directory, or replace it with --force")


@dataclass(frozen=True)
class Reservation:
    """The right to write one artifact.

    Attributes:
        target: Where the artifact will be, absolute and behind all links.
        work: The directory beside it that is the writer's own.
        force, inputs: See `check_target`.
    """

    target: Path
    work: Path
    force: bool = False
    inputs: tuple[Path, ...] = ()

    @property
    def partial(self) -> Path:
        """The directory where the artifact grows."""
        return self.work / _ARTIFACT

    @property
    def left_key(self) -> str:
        """The key of what a killed compile left here, "" if it left nothing that can be gone on with."""
        path = self.work / _KEY
        with naming(path):
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def note_key(self, key: str) -> None:
        """Record which values the shards hold, should this compile be killed."""
        path = self.work / _KEY
        with naming(path):
            # In one step, so that a killed compile leaves no half of it.
            (self.work / _NEW_KEY).write_text(key, encoding="utf-8")
            (self.work / _NEW_KEY).rename(path)

    def prepare(self, *, keep_shards: bool) -> Path:
        """Make the directory for the artifact.

        Args:
            keep_shards: A killed compile's shards stay in it, with their journals.

        Returns:
            `partial`, otherwise empty.

        Raises:
            OSError: It cannot be written.
        """
        if keep_shards and not self.partial.is_symlink():
            _remove_all_but_shards(self.partial)
        else:
            (self.work / _KEY).unlink(missing_ok=True)
            _remove(self.partial)
        self.partial.mkdir(exist_ok=True)
        return self.partial

    def put_in_place(self) -> None:
        """Move the complete artifact to its target.

        Raises:
            UsageError: Somebody put something there meanwhile, which is untouched; the artifact is beside it.
            OSError: It cannot; the old one is where it was.
        """
        for journal in self.partial.rglob(JOURNAL):
            journal.unlink()
        try:
            check_target(self.target, self.force, self.inputs)
        except UsageError as error:
            fallback = _free_name(self.target)
            self.partial.rename(fallback)
            raise UsageError(f"{error} (what was compiled meanwhile is in {fallback})") from None
        if not self.target.exists():
            self.partial.rename(self.target)
        elif not exchange(self.partial, self.target):
            old = self.work / _OLD
            self.target.rename(old)
            try:
                self.partial.rename(self.target)
            except BaseException:
                old.rename(self.target)
                raise
        _sync_directory(self.target.parent)


@contextmanager
def reserved(directory: Path | str, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Reservation]:
    """Reserve an artifact's path for this writer alone.

    What was written and not put in place is removed at the end, also after Ctrl-C.

    Args:
        directory: The artifact's; its parents are made if need be.
        force, inputs: See `check_target`.

    Raises:
        UsageError: Somebody else is writing it; or see `check_target`.
        InputFileError: Nothing can be written there.
    """
    target = resolved(directory)
    check_target(target, force, inputs)
    work = target.parent / f".{target.name}.partial"
    with os_errors_as(f"{target}: cannot be written"):
        _require_own(work)
        new_parents = [parent for parent in target.parents if not parent.exists()]
        lock = _lock(work)
    if lock is None:
        raise UsageError(f"{target}: another compile is writing it; wait for that one, or choose another directory")
    try:
        with os_errors_as(f"{target}: cannot be written"):
            _restore(work / _OLD, target)
        check_target(target, force, inputs)  # the one that held the lock may have finished just now
        yield Reservation(target, work, force, tuple(inputs))
    finally:
        _clear(work)
        for parent in new_parents:
            _remove_if_empty(parent)
        os.close(lock)


def _lock(work: Path) -> int | None:
    """Take the lock; None if a living process has it."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # its holder has just ended and removed the directory
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open(work / _LOCK, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # what was locked is no longer the file of that name


def _require_own(work: Path) -> None:
    """Make sure that the directory for the writer is not somebody else's.

    Raises:
        UsageError: It is.
    """
    if not os.path.lexists(work):
        return
    others = [work.name]
    if work.is_dir() and not work.is_symlink():
        names = {path.name for path in work.iterdir()}
        # Made before and removed after all others.
        own_names = {_LOCK, _KEY, _NEW_KEY, _ARTIFACT, _OLD} if _LOCK in names else set()
        others = sorted(names - own_names)
    if others:
        raise UsageError(
            f"{work} is needed while the artifact is written, and no compile made {', '.join(others[:3])}; move it away"
        )


def _free_name(target: Path) -> Path:
    number = 1
    while os.path.lexists(candidate := target.with_name(f"{target.name}.{number}")):
        number += 1
    return candidate


def _is_open(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _restore(old: Path, target: Path) -> None:
    """Undo the first half of a replacement in two steps that was killed between them."""
    if old.is_dir() and not target.exists():
        old.rename(target)


def _clear(work: Path) -> None:
    """Remove the directory, the lock last: whoever holds it may still be alone in here."""
    for name in (_KEY, _NEW_KEY, _ARTIFACT, _OLD):
        _remove(work / name)
    (work / _LOCK).unlink(missing_ok=True)
    _remove_if_empty(work)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # it holds the artifact, or the next writer has come in already


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_all_but_shards(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() or not name.endswith(_RESUMABLE_SUFFIXES):
                path.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
