"""Known sequences fed to a decoder as if it had generated them, so that its logits can be compared with a full run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kraken_compiler.runtime.decoder import Decoder


def split_lengths(batch: int, tokens: int) -> tuple[list[int], int]:
    """How long every row's prompt is taken to be, and how many steps follow; lengths differ where they can.

    Args:
        batch: Number of sequences.
        tokens: Length of every sequence.
    """
    longest = max(tokens - 3, 1)
    lengths = [max(longest - 2 * row, 1) for row in range(batch)]
    return lengths, tokens - longest


def capacities(tokens: int, limit: int | None) -> tuple[int, ...]:
    """Capacities to replay sequences of a length at: never the length itself, where the model has room for more.

    What a cache computes once, for its capacity, is then computed for other lengths than recomputation computes it for.

    Args:
        tokens: Length of the sequences.
        limit: The longest that the model takes; None if there is none.
    """
    found = [capacity for capacity in (tokens + 1, 3 * tokens + 64) if limit is None or capacity <= limit]
    return tuple(found) or (tokens,)


def replay(decoder: Decoder[Tensor], ids: Tensor) -> Tensor:
    """Feed sequences: first a prompt of every row, then token after token.

    Args:
        decoder: Takes a batch of that size.
        ids: int64 [batch, tokens].

    Returns:
        Logits [batch, 1 + steps, vocabulary] after the prompt and after every step.
    """
    lengths, steps = split_lengths(*ids.shape)
    counts = torch.tensor(lengths)
    decoder.reset()
    logits = [decoder.prefill(ids[:, : max(lengths)], counts)]
    for step in range(steps):
        logits.append(decoder.step(ids[torch.arange(len(ids)), counts + step]))
    return torch.stack(logits, dim=1)


def expected(logits: Tensor, lengths: Sequence[int], steps: int) -> Tensor:
    """The rows of a full run's logits [batch, tokens, vocabulary] that `replay` returns."""
    rows = torch.arange(len(logits))[:, None]
    return logits[rows, torch.tensor(lengths)[:, None] - 1 + torch.arange(steps + 1)]


def prefix_lengths(lengths: Sequence[int], steps: int) -> list[int]:
    """How long the sequences are at the prompts' ends and after every step; ascending."""
    return sorted({length + step for length in lengths for step in range(steps + 1)})


def recomputed(logits: Mapping[int, Tensor], lengths: Sequence[int], steps: int) -> Tensor:
    """What `replay` returns, from runs on every prefix.

    Args:
        logits: Of the sequences' first `n` tokens [batch, n, vocabulary], for every `n` that `prefix_lengths` gives.
        lengths: Of the prompts.
        steps: How many tokens follow.
    """
    rows = [[logits[length + step][row, -1] for step in range(steps + 1)] for row, length in enumerate(lengths)]
    return torch.stack([torch.stack(row) for row in rows])
