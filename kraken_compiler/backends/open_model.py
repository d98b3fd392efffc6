"""`open_model`: this rank's program of an artifact, if the ranks fit together. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.artifact.version import own_version
from kraken_compiler.backends.base import Backend, RankModel
from kraken_compiler.errors import KrakenError, UsageError
from kraken_compiler.ranks.communicators.agreement import THE_ARTIFACT, Claims
from kraken_compiler.ranks.environment import SLOWEST_DISK
from kraken_compiler.ranks.session import Ranks

_SHOWN_DIGITS = 16


def open_model(
    directory: Path | str,
    ranks: Ranks,
    choose: Callable[[Artifact], Backend[Any]],
    *,
    checking: bool = False,
) -> tuple[Artifact, RankModel]:
    """Open this rank's program of an artifact; all ranks go on when all have theirs.

    Args:
        directory: The artifact.
        ranks: This rank.
        choose: Gives the backend whose program is run; raises if there is none.
        checking: The program is run to be compared, see `Backend.open`.

    Raises:
        InputFileError: A file of the artifact is missing, truncated or tampered with, on any rank, or the ranks have
            different artifacts.
        UsageError: There are more or fewer ranks than lanes, or the ranks do not fit together.
    """
    with _agreement(ranks) as claims:
        artifact = open_artifact(directory, verify=False)
        backend = choose(artifact)
        require_degree(artifact.manifest.degree, ranks.degree)
        claims |= rank_claims(artifact, backend.name, ranks.reduce_dtype)
    files = backend.rank_files(artifact, ranks.rank)
    records = artifact.manifest.files
    seconds = sum(records[name].bytes for name in files if name in records) / SLOWEST_DISK
    ranks.status.computes_in = backend.computes_in
    ranks.status.progress("loading the program", extra=seconds)
    # Here and not at the first reduce, where waiting for a slow disk would look like a hang.
    with _agreement(ranks):
        artifact.verify(*files)
        model = backend.open(artifact, ranks, checking=checking)
    ranks.status.progress("running")
    return artifact, model


@contextmanager
def _agreement(ranks: Ranks) -> Iterator[dict[str, str]]:
    """Raise on all ranks what goes wrong on one, and let them go on together; gives what must be the same on all."""
    claims: dict[str, str] = {}
    try:
        yield claims
    except KrakenError as error:
        if not ranks.status.has_launcher:  # it ends the others
            ranks.agree(Claims(trouble=error))
        raise
    ranks.agree(Claims(claims))


def require_degree(degree: int, ranks: int) -> None:
    """Make sure that there are as many ranks as lanes.

    Raises:
        UsageError: There are more or fewer.
    """
    if ranks != degree:
        subject = "1 rank was" if ranks == 1 else f"{ranks} ranks were"
        raise UsageError(
            f"the program has {degree} lanes and {subject} started; start {degree}, or compile for degree {ranks}"
        )


def rank_claims(artifact: Artifact, backend: str, reduce_dtype: object = None) -> dict[str, str]:
    """The claims that must be the same on all ranks, by a name for the error message.

    Args:
        artifact: This rank's.
        backend: Whose program it runs.
        reduce_dtype: To which it rounds its parts of sums; None leaves them.
    """
    return {
        "the version of kraken-compiler": own_version(),
        "the backend": backend,
        THE_ARTIFACT: artifact.fingerprint()[:_SHOWN_DIGITS],
        "--reduce-dtype": "not given" if reduce_dtype is None else str(reduce_dtype).removeprefix("torch."),
    }
