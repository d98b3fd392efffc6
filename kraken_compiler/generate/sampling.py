"""Choice of the next token: the most likely one, or one drawn from the likely ones. Imports no torch.

Random numbers are a hash of (seed, row, step) and not a generator's state: a row's text depends neither on its
neighbours in the batch nor on the device, and every rank computes the same numbers without being told.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kraken_compiler.errors import UsageError

_RANDOM_BITS = 48


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of tokens.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token and ignores the rest.
        top_k: Only the k most likely tokens, and what ties with the last of them; None means all.
        top_p: Only the most likely tokens up to and with the one whose probability brings their sum to p.
        seed: Seed of the random numbers.

    Raises:
        UsageError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature:g}: give 0 for the most likely token, or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k {self.top_k}: give at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p:g}: give a number above 0 and at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed {self.seed}: give a number from 0 to 2^63 - 1")

    def choose(self, logits: npt.NDArray[Any], step: int) -> npt.NDArray[np.int64]:
        """Choose a token for every row.

        Args:
            logits: Of any floating-point type, [batch, vocabulary].
            step: Number of the new token, from 0.

        Returns:
            Token ids, int64 [batch]; of tokens that are equally likely, greedy choice takes the first.
        """
        if self.temperature == 0:
            best: npt.NDArray[np.int64] = logits.argmax(axis=-1)
            return best
        mass = softmax(self.filtered(logits)).cumsum(axis=-1)
        numbers = [uniform(self.seed, row, step) for row in range(len(logits))]
        # The first token whose mass exceeds the number; one without probability adds no mass and is never it.
        tokens = [np.searchsorted(of_row, number * of_row[-1], side="right") for of_row, number in zip(mass, numbers)]
        return np.array(tokens, np.int64)

    def filtered(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Logits [batch, vocabulary] over the temperature, in float64; those of tokens that are out are -inf."""
        # The best is subtracted first, so that a tiny temperature does not overflow; a softmax does not notice.
        scores: npt.NDArray[np.float64] = logits.astype(np.float64)
        with np.errstate(over="ignore"):
            scores = (scores - scores.max(axis=-1, keepdims=True)) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = np.partition(scores, -self.top_k, axis=-1)[:, -self.top_k, None]
            scores[scores < least] = -np.inf
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-scores, axis=-1, kind="stable")
            probabilities = softmax(np.take_along_axis(scores, order, axis=-1))
            before = probabilities.cumsum(axis=-1) - probabilities
            out = np.zeros(scores.shape, np.bool_)
            np.put_along_axis(out, order, before >= self.top_p, axis=-1)
            scores[out] = -np.inf
        return scores


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities [batch, vocabulary] of scores of that shape, each of which may be -inf but one."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def uniform(seed: int, row: int, step: int) -> float:
    """A number from 0 (included) to 1 (excluded) that depends on nothing but the arguments."""
    key = b"".join(part.to_bytes(8, "little") for part in (seed, row, step))
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _RANDOM_BITS)) / (1 << _RANDOM_BITS)
