"""What generation needs of a program: read the prompts once, then one token per row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kraken_compiler.errors import UsageError


class Decoder(Protocol):
    """A language model that remembers what it has read. Under ranks, all of them call it together.

    Attributes:
        batch: Number of rows.
        capacity: Most tokens a row can have, prompt and new ones together.

    A decoder may also have an attribute `identical_on_all_ranks`. True promises that ranks that run the same kernels
    get the same logits to the last bit.
    """

    @property
    def batch(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Read prompts into an empty decoder.

        Args:
            ids: Token ids, int64 [batch, sequence], padded on the right.
            lengths: Tokens of every row, int64 [batch], at least one each.

        Returns:
            Logits [batch, vocabulary] at every row's last token.

        Raises:
            UsageError: A row is longer than the capacity.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row.

        Args:
            tokens: int64 [batch].

        Returns:
            Logits [batch, vocabulary] at the new tokens.

        Raises:
            UsageError: A row is full.
        """

    def reset(self) -> None:
        """Forget all rows."""


class RecomputingDecoder:
    """A decoder for a program without a cache: it reads all there is again for every token.

    Rows of different lengths are padded on the right, which a causal model does not notice.
    """

    def __init__(self, logits_of: Callable[[Tensor], Tensor], batch: int, capacity: int) -> None:
        """Wrap a language model.

        Args:
            logits_of: Token ids [rows, sequence] -> logits [rows, sequence or 1, vocabulary], as `logits_function`.
            batch: Number of rows.
            capacity: Most tokens of a row.
        """
        self.batch = batch
        self.capacity = capacity
        self._logits_of = logits_of
        self._ids = torch.zeros((batch, 0), dtype=torch.int64)
        self._lengths = torch.zeros(batch, dtype=torch.int64)

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """See `Decoder.prefill`."""
        assert len(ids) == len(lengths) == self.batch, f"{list(ids.shape)} ids for a batch of {self.batch}"
        longest = int(lengths.max())
        check_capacity(longest, self.capacity)
        self._ids = ids[:, :longest]
        self._lengths = lengths.to(ids.device)
        return self._last_logits()

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        longest = int(self._lengths.max()) + 1
        check_capacity(longest, self.capacity)
        wider = torch.nn.functional.pad(self._ids, (0, longest - self._ids.shape[1]))
        self._ids = wider.scatter(1, self._lengths.unsqueeze(1), tokens.unsqueeze(1))
        self._lengths = self._lengths + 1
        return self._last_logits()

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self._ids = self._ids[:, :0]
        self._lengths = torch.zeros_like(self._lengths)

    def _last_logits(self) -> Tensor:
        logits = self._logits_of(self._ids)
        if logits.shape[1] == self._ids.shape[1]:
            return logits[torch.arange(self.batch, device=logits.device), self._lengths - 1]
        # The model gives the logits of the last position only, so no row may be padded.
        rows = [self._logits_of(row[None, :length]) for row, length in zip(self._ids, self._lengths.tolist())]
        return torch.cat([row[:, -1] for row in rows])


def check_capacity(needed: int, capacity: int) -> None:
    """Make sure that rows fit.

    Raises:
        UsageError: `needed` tokens are more than the capacity.
    """
    if needed > capacity:
        raise UsageError(
            f"prompt and new tokens need room for {needed} tokens, there is room for {capacity}; "
            "shorten the prompt, ask for fewer new tokens, or raise the context (--max-context)"
        )
