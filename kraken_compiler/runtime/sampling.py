"""Which token comes next: the most likely one, or one drawn from the likely ones.

Random numbers are a hash of (seed, row, step) and not a generator's state: a row's text depends neither on its
neighbours in the batch nor on the device, and every rank computes the same numbers without being told.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_compiler.errors import UsageError

_RANDOM_BITS = 48


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

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

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """Choose a token for every row.

        Args:
            logits: [batch, vocabulary].
            step: Number of the new token, from 0.

        Returns:
            Token ids, int64 [batch].
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = self.filtered(logits).softmax(dim=-1)
        mass = probabilities.double().cumsum(dim=-1)
        numbers = [uniform(self.seed, row, step) for row in range(logits.shape[0])]
        drawn = torch.tensor(numbers, dtype=mass.dtype, device=mass.device).unsqueeze(-1) * mass[:, -1:]
        # The first token whose mass exceeds the number; one without probability adds no mass and is never it.
        return torch.searchsorted(mass, drawn, right=True).squeeze(-1)

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits [batch, vocabulary] over the temperature, in float32; those of tokens that are out are -inf."""
        # The best is subtracted first, so that a tiny temperature does not overflow; a softmax does not notice.
        scores = logits.float()
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            probabilities = ordered.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            scores = scores.masked_fill(out, float("-inf"))
        return scores


def uniform(seed: int, row: int, step: int) -> float:
    """A number from 0 (included) to 1 (excluded) that depends on nothing but the arguments."""
    key = b"".join(part.to_bytes(8, "little") for part in (seed, row, step))
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _RANDOM_BITS)) / (1 << _RANDOM_BITS)
