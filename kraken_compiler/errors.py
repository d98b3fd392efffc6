"""Errors meant for users: each says what is wrong, where, and what to try.

Our own invariants are `assert`s. Every class carries the exit code that the command line returns for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class KrakenError(Exception):
    """Base of every error a user can cause or meet."""

    exit_code = 1


class UsageError(KrakenError):
    """Wrong options: unknown form, a degree the model cannot be divided to, a bad layer range."""

    exit_code = 2


class UnsupportedModelError(KrakenError):
    """The model is readable, but a part of it cannot be rewritten."""

    exit_code = 3

    def __init__(self, rejections: Sequence[Rejection]) -> None:
        self.rejections = tuple(rejections)
        super().__init__("\n".join(str(rejection) for rejection in self.rejections))


class VerificationError(KrakenError):
    """An emitted program does not compute what it must, or lost its overlap."""

    exit_code = 4


class InputFileError(KrakenError):
    """A model file or an artifact is missing, truncated, tampered with, or cannot be read or written."""

    exit_code = 5


class RankFailedError(KrakenError):
    """One of the cooperating processes died or hung."""

    exit_code = 1


@dataclass(frozen=True)
class Rejection:
    """Reason why a part of a model was not matched.

    Attributes:
        reason: One sentence for the user.
        nodes: Names of the guilty graph nodes.
        path: Module path of the first guilty node, as the source model spells it ("" if unknown).
        hint: What to try instead.
    """

    reason: str
    nodes: tuple[str, ...] = ()
    path: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"module '{self.path}'" if self.path else "the model"
        guilty = f" (node {', '.join(self.nodes[:3])}{', ...' if len(self.nodes) > 3 else ''})" if self.nodes else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"unsupported: {place}{guilty}: {self.reason}.{hint}"


def first_line(error: BaseException) -> str:
    """The message of an error in one line; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def typed_line(error: BaseException) -> str:
    """The message of an error with its type in front, where the text alone says little: `KeyError: 'x'`."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")


@contextmanager
def os_errors_as(what: str) -> Iterator[None]:
    """Turn an OSError of the block into an `InputFileError`.

    Args:
        what: What cannot be done; the system's reason follows.
    """
    try:
        yield
    except OSError as error:
        raise InputFileError(f"{what}: {error.strerror or error}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give every OSError of the block a file name.

    Opening a file that is not there names it; a write that meets a full disk knows only a number.

    Args:
        path: The file that the block works on.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def missing_packages(what: str, error: ImportError, extra: str = "hf") -> UsageError:
    """Error for a missing optional package, which says what to install.

    Args:
        what: What cannot be done, e.g. "reading the GGUF file model.gguf".
        error: The error of the import.
        extra: Which of our extras installs them.
    """
    return UsageError(
        f"{what} needs packages that are not installed: pip install 'kraken-compiler[{extra}]' ({first_line(error)})"
    )
