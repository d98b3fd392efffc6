"""All ranks of an artifact as threads of this process: to measure their logits without starting processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Array, Backend
from kraken_compiler.lanes.derived_inputs import logits_function
from kraken_compiler.ranks.communicators.threads import Mailboxes, ThreadExchange, in_threads
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks

Result = TypeVar("Result")


def thread_ranks(mailboxes: Mailboxes, rank: int) -> Ranks:
    """One thread as a rank.

    Args:
        mailboxes: Where the threads of a run leave what they send each other.
        rank: This thread's number.
    """
    degree = mailboxes.degree
    exchange = ThreadExchange(mailboxes, rank) if degree > 1 else None
    return Ranks(Place(rank, degree, rank, degree), StatusWriter(rank, None), exchange)


def alone(degree: int) -> Ranks:
    """Rank 0 of several whose peers never come; good for everything but collectives."""
    return thread_ranks(Mailboxes(degree), 0)


def together(degree: int, act: Callable[[Ranks], Result]) -> list[Result]:
    """Call `act` in one thread per rank; returns what they return, rank 0 first.

    Raises:
        Exception: What the first rank that failed raised.
    """
    mailboxes = Mailboxes(degree)
    return in_threads(mailboxes, lambda rank: act(thread_ranks(mailboxes, rank)))


def logits_in_threads(artifact: Artifact, backend: Backend[Any]) -> Callable[[Tensor], Tensor]:
    """An artifact's programs as one language model.

    Args:
        artifact: The artifact.
        backend: Whose programs.

    Returns:
        Token ids [batch, sequence] -> logits [batch, sequence, vocabulary], until the next call.

    Raises:
        InputFileError: A file of the artifact is damaged.
    """
    manifest = artifact.manifest
    mailboxes = Mailboxes(manifest.degree)
    models = [backend.open(artifact, thread_ranks(mailboxes, rank)) for rank in range(manifest.degree)]

    def run(inputs: Mapping[str, Array]) -> Sequence[Array]:
        return in_threads(mailboxes, lambda rank: models[rank].run(inputs))[0]

    logits_of = logits_function(manifest.inputs, manifest.call, run)
    return lambda ids: torch.from_numpy(logits_of(ids.numpy()))
