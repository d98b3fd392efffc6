"""Known sequences fed to a decoder as if it had generated them, so that its logits can be compared with a full run."""

from __future__ import annotations

import numpy as np

from kraken_compiler.generate.decoder import Array, CacheDecoder, Decoder


def split_lengths(batch: int, tokens: int) -> tuple[list[int], int]:
    """Split rows into prompts and steps: every prompt's length, which differ if they can, and the number of steps.

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
    longer = [capacity for capacity in (tokens + 1, 3 * tokens + 64) if limit is None or capacity <= limit]
    return tuple(longer) or (tokens,)


def replay(decoder: Decoder, ids: Array) -> Array:
    """Feed sequences: first a prompt of every row, then token after token.

    Args:
        decoder: Takes a batch of that size.
        ids: int64 [batch, tokens].

    Returns:
        Logits [batch, 1 + steps, vocabulary] after the prompt and after every step.
    """
    ids = np.asarray(ids)
    prompts, steps = split_lengths(*ids.shape)
    lengths = np.array(prompts)
    decoder.reset()
    logits = [decoder.prefill(ids[:, : max(prompts)], lengths).copy()]
    for step in range(steps):
        logits.append(decoder.step(ids[np.arange(len(ids)), lengths + step]).copy())
    return np.stack(logits, axis=1)


def cuts(count: int) -> tuple[int, ...]:
    """Where to cut a prompt or a batch into halves: one at either end, and unevenly; nowhere if it is too short.

    Args:
        count: Length of the longest prompt, or number of rows.
    """
    return tuple(sorted({1, count // 3, count - 1} - {0, count})) if count > 1 else ()


def replay_halves(decoder: CacheDecoder, ids: Array, cut: int) -> Array:
    """Feed sequences like `replay`, prompts as two halves, and what follows as two halves behind them.

    Args:
        decoder: Takes a batch of that size.
        ids: int64 [batch, tokens].
        cut: How many tokens of the longest prompt the first half has.

    Returns:
        Logits [batch, 2, vocabulary] after the prompts and at the end.
    """
    ids = np.asarray(ids)
    prompts, steps = split_lengths(*ids.shape)
    lengths = np.array(prompts)
    decoder.reset()
    logits = [decoder.prefill(ids[:, : max(prompts)], lengths, cut).copy()]
    rest = ids[np.arange(len(ids))[:, None], lengths[:, None] + np.arange(steps)]
    logits.append(decoder.prefill(rest, np.full(len(ids), steps), min(cut, steps - 1)).copy())
    return np.stack(logits, axis=1)
