"""The check that ranks run the same program: otherwise each adds up parts of another one, and nobody notices.

Every rank claims what it has, as text by name, and also if it cannot take part at all; then all get the same verdict.
Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kraken_compiler.errors import InputFileError, KrakenError, RankFailedError, UsageError

THE_ARTIFACT = "the compiled model (a hash of its program and weights)"
"""The claim whose difference is an error of the files, not of the usage."""

_KINDS: dict[str, type[KrakenError]] = {kind.__name__: kind for kind in (UsageError, InputFileError, RankFailedError)}


@dataclass(frozen=True)
class Claims:
    """The claims of a rank about itself.

    Attributes:
        same: What must be the same on all ranks, by a name for the error message.
        trouble: Why it cannot take part; None if it can.
    """

    same: Mapping[str, str] = field(default_factory=dict)
    trouble: KrakenError | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"same": dict(self.same), "trouble": None if self.trouble is None else error_as_dict(self.trouble)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        trouble = values["trouble"]
        return cls(values["same"], None if trouble is None else error_from_dict(trouble))


def error_as_dict(error: KrakenError) -> dict[str, str]:
    """An error as plain values."""
    return {"kind": type(error).__name__, "message": str(error)}


def error_from_dict(values: Mapping[str, Any]) -> KrakenError:
    """The inverse of `error_as_dict`, of the same class if peers may meet with it."""
    return _KINDS.get(values["kind"], RankFailedError)(values["message"])


def require_agreement(claims: Claims, swap: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """Make sure that ranks fit together; all of them must call it together.

    Args:
        claims: This rank's.
        swap: Gives a rank's plain values to all ranks; returns everybody's, rank 0's first.

    Raises:
        InputFileError, UsageError, RankFailedError: They do not; this rank's own trouble is raised as it is.
    """
    claims_of_ranks = swap(claims.to_dict())
    if claims.trouble is not None:
        raise claims.trouble
    error = disagreement({rank: Claims.from_dict(values) for rank, values in enumerate(claims_of_ranks)})
    if error is not None:
        raise error


def disagreement(claims: Mapping[int, Claims]) -> KrakenError | None:
    """The error that keeps ranks from working together, the same on all of them; None if there is none.

    Args:
        claims: By rank.
    """
    for rank, claim in sorted(claims.items()):
        if claim.trouble is not None:
            return _KINDS.get(type(claim.trouble).__name__, RankFailedError)(f"rank {rank}: {claim.trouble}")
    for name in dict.fromkeys(name for claim in claims.values() for name in claim.same):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, claim in sorted(claims.items()):
            ranks_by_value.setdefault(claim.same.get(name, "unknown"), []).append(rank)
        if len(ranks_by_value) > 1:
            differences = " and ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_by_value.items())
            if name == THE_ARTIFACT:
                return InputFileError(f"the ranks do not fit together: {name} is {differences}; copy one to all hosts")
            return UsageError(f"the ranks do not fit together: {name} is {differences}")
    return None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
