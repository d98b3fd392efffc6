"""Interface of a program to generation: prompts are read once, then one token per row at a time. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.backends.base import RankModel
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.size_checks import BATCH, token_rules
from kraken_compiler.ir.size_rules import names_in
from kraken_compiler.lanes.derived_inputs import logits_function, reads_source

Array = npt.NDArray[Any]


class Decoder(Protocol):
    """A language model that remembers what it has read. Under ranks, all of them call it together.

    Attributes:
        batch: Number of rows.
        capacity: Most tokens a row can have, prompt and new ones together.
        identical_on_all_ranks: True promises that all ranks get the same logits to the last bit.
    """

    @property
    def batch(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def identical_on_all_ranks(self) -> bool: ...

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """Append several tokens to every row, the prompts of an empty decoder for instance.

        Args:
            ids: Token ids, int64 [batch, sequence], padded on the right.
            lengths: Tokens of every row, int64 [batch], at least one each.

        Returns:
            Logits [batch, vocabulary] at every row's last token, until the next call.

        Raises:
            UsageError: A row is longer than the capacity.
        """

    def step(self, tokens: Array) -> Array:
        """Append a token to every row.

        Args:
            tokens: int64 [batch].

        Returns:
            Logits [batch, vocabulary] at the new tokens, until the next call.

        Raises:
            UsageError: A row is full.
        """

    def reset(self) -> None:
        """Forget all rows."""


@runtime_checkable
class SplitDecoder(Decoder, Protocol):
    """A decoder that may read in two halves, each of whose reduces flies while the other half computes.

    Attributes:
        can_split: True if it can.
        split_from: The fewest tokens of a row that it reads so unasked; None if it never does.
    """

    can_split: bool
    split_from: int | None


@runtime_checkable
class CacheDecoder(SplitDecoder, Protocol):
    """A decoder with a KV cache: what it has read it need not read again. Its halves are halves of the tokens."""

    def rewind(self, tokens: int) -> None:
        """Forget all but the first tokens of every row.

        Args:
            tokens: How many stay; no row has fewer.
        """

    def prefill(self, ids: Array, lengths: Array, cut: int | None = None) -> Array:
        """Append several tokens to every row; see `Decoder.prefill`.

        Args:
            ids, lengths: See `Decoder.prefill`.
            cut: How many tokens the first half has, 0 to read all at once; None leaves it to `split_from`.
        """


class RecomputingDecoder:
    """A decoder for a program without a cache: it reads all there is again for every token.

    Rows of one length run together and are never padded: many a program has no cache because what it computes of a
    token depends on those behind it, or on how many there are.

    Attributes:
        batch, capacity, identical_on_all_ranks: See `Decoder`.
        can_split, split_from: See `SplitDecoder`; its halves are halves of the rows.
    """

    def __init__(
        self,
        logits_of: Callable[[Array], Array],
        batch: int,
        capacity: int,
        in_halves: Callable[[Array], Array] | None = None,
        *,
        identical_on_all_ranks: bool = False,
        takes_fewer_rows: bool = True,
    ) -> None:
        """Wrap a language model.

        Args:
            logits_of: Token ids, int64 [rows, sequence] -> logits [rows, sequence or 1, vocabulary].
            batch: Number of rows.
            capacity: Most tokens of a row.
            in_halves: The same, run as two halves of the rows; None if nothing does.
            identical_on_all_ranks: Whether these logits are; of any function nothing is known.
            takes_fewer_rows: False if it must always be given the whole batch's number of rows.
        """
        self.batch = batch
        self.capacity = capacity
        self.identical_on_all_ranks = identical_on_all_ranks
        self.can_split = in_halves is not None
        self.split_from: int | None = None
        self._in_halves = in_halves
        self._logits_of = logits_of
        self._takes_fewer_rows = takes_fewer_rows
        self._ids = np.zeros((batch, 0), np.int64)
        self._lengths = np.zeros(batch, np.int64)

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """See `Decoder.prefill`; it reads prompts only, into an empty decoder."""
        assert len(ids) == len(lengths) == self.batch, f"{list(ids.shape)} ids for a batch of {self.batch}"
        longest = int(lengths.max())
        check_capacity(longest, self.capacity)
        self._ids = np.array(ids[:, :longest], np.int64)
        self._lengths = np.array(lengths, np.int64)
        return self._last_logits()

    def step(self, tokens: Array) -> Array:
        """See `Decoder.step`."""
        longest = int(self._lengths.max()) + 1
        check_capacity(longest, self.capacity)
        self._ids = np.pad(self._ids, ((0, 0), (0, longest - self._ids.shape[1])))
        self._ids[np.arange(self.batch), self._lengths] = tokens
        self._lengths = self._lengths + 1
        return self._last_logits()

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self._ids = self._ids[:, :0]
        self._lengths = np.zeros_like(self._lengths)

    def _last_logits(self) -> Array:
        logits: dict[int, Array] = {}
        for length, rows in rows_by_length(self._lengths.tolist()):
            logits |= zip(rows, self._logits_of_rows(self._ids[rows, :length])[: len(rows), -1].copy())
        return np.stack([logits[row] for row in range(self.batch)])

    def _logits_of_rows(self, ids: Array) -> Array:
        """Logits of rows of one length; if the model takes whole batches only, those of copies follow."""
        if not self._takes_fewer_rows:
            ids = np.resize(ids, (self.batch, ids.shape[1]))
        is_long = self.split_from is not None and ids.shape[1] >= self.split_from
        if self._in_halves is not None and is_long and len(ids) == self.batch:
            return self._in_halves(ids)
        return self._logits_of(ids)


class SeparateRows:
    """A decoder whose rows are decoders of one row each: of an encoder-decoder, every row has read a text of its own.

    Attributes:
        batch: Number of rows.
        capacity: Most tokens of a row.
        identical_on_all_ranks: See `Decoder`.
    """

    def __init__(self, rows: Sequence[Decoder]) -> None:
        """Put rows together; there must be one."""
        self.batch, self.capacity = len(rows), min(row.capacity for row in rows)
        self.identical_on_all_ranks = all(row.identical_on_all_ranks for row in rows)
        self._rows = rows

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """See `Decoder.prefill`."""
        parts = [row.prefill(ids[at : at + 1], lengths[at : at + 1]).copy() for at, row in enumerate(self._rows)]
        return np.concatenate(parts)

    def step(self, tokens: Array) -> Array:
        """See `Decoder.step`."""
        return np.concatenate([row.step(tokens[at : at + 1]).copy() for at, row in enumerate(self._rows)])

    def reset(self) -> None:
        """See `Decoder.reset`."""
        for row in self._rows:
            row.reset()


def decoder_of(
    model: RankModel, manifest: Manifest, batch: int, capacity: int, sources: Sequence[Sequence[int]] = ()
) -> Decoder:
    """A decoder with room for a batch of rows.

    Args:
        model: This rank's program.
        manifest: Its artifact's.
        batch: Number of rows.
        capacity: Most tokens of a row, prompt and new ones together.
        sources: Token ids of the text that an encoder-decoder reads, for every row.

    Raises:
        UsageError: The model does not reach that far, or is no language model.
    """
    decoder = model.decoder(batch, capacity) if manifest.cache is not None else None
    if decoder is not None:
        return decoder
    logits_of: Callable[..., Array] = logits_function(manifest.inputs, manifest.call, model.run)
    rules = token_rules(manifest.call, manifest.inputs)
    recomputing = partial(
        RecomputingDecoder,
        identical_on_all_ranks=model.identical_on_all_ranks,
        takes_fewer_rows=not any(BATCH in names_in(rule) for rule in rules),
    )
    if not reads_source(manifest.inputs):
        in_halves = None
        if model.can_cut_rows and batch > 1:
            in_halves = logits_function(manifest.inputs, manifest.call, partial(model.run_rows, cut=batch // 2))
        return recomputing(logits_of, batch, capacity, in_halves)

    def row(source: Sequence[int]) -> RecomputingDecoder:
        text = np.array([source], np.int64)
        return recomputing(lambda ids: logits_of(ids, text), 1, capacity)

    # It reads source and answer again for every token.
    return SeparateRows(list(map(row, sources)))


def rows_by_length(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The lengths that rows have, and the numbers of the rows of each, longest first.

    Args:
        lengths: Of every row.
    """
    for length in sorted(set(lengths), reverse=True):
        yield length, [row for row, of_row in enumerate(lengths) if of_row == length]


def check_capacity(tokens: int, capacity: int) -> None:
    """Make sure that rows fit.

    Raises:
        UsageError: There are more tokens than the capacity.
    """
    if tokens > capacity:
        raise UsageError(
            f"prompt and new tokens need room for {tokens} tokens, there is room for {capacity}; "
            "shorten the prompt, ask for fewer new tokens, or raise the context (--max-context)"
        )
