"""Prefill and decode with a KV cache, on one device, in numpy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kraken_compiler.backends.onnx_ort.format import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    SEQUENCE,
    past_name,
    present_name,
)
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.gathered_outputs import is_gathered
from kraken_compiler.backends.sequences import (
    Array,
    cut_of,
    require_batch,
    require_memory,
    require_prompts,
    require_space,
    token_bytes,
)
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.size_checks import refusal
from kraken_compiler.ir.size_rules import broken_rule

_SIDES = 2


class ArrayDecoder:
    """A batch of sequences that grow; all devices must call it together.

    Rows of different lengths are padded on the left, as is usual for ONNX language models; the mask hides the padding.
    Every step reads one set of buffers and writes the other; where tokens are read as two halves, the first half's
    presents are a third.

    Attributes:
        batch: Number of sequences.
        capacity: Most tokens of a sequence, prompt and new ones together.
        identical_on_all_ranks: True if the devices gather the logits; nothing promises that ONNX Runtime makes the same
            of equal sums, to the last bit.
        can_split: True if tokens may be read as two halves.
        split_from: The fewest tokens that are; None if all are read at once.
    """

    def __init__(self, program: DeviceProgram, batch: int, capacity: int, *, can_split: bool = True) -> None:
        """Allocate the caches.

        Args:
            program: The device's.
            batch, capacity: See the class.
            can_split: Whether tokens may be read as two halves.

        Raises:
            UsageError: The model keeps no cache, or takes fewer tokens than the capacity, or the memory does.
        """
        model = program.model
        if model.caches is None:
            raise UsageError("the program has no KV cache")
        require_batch(batch, capacity, model.positions)
        bytes_per_token = token_bytes(model.caches, lambda dtype: np.dtype(dtype).itemsize)
        require_memory(_SIDES * batch * capacity * bytes_per_token, capacity)
        self.batch, self.capacity = batch, capacity
        self.identical_on_all_ranks = is_gathered(model.proto.graph, LOGITS)
        self._program = program
        self.split_from: int | None = None
        self.can_split = can_split and model.degree > 1
        self._caches = [
            (cache.heads, dim, cache.dtype) for cache in model.caches for dim in (cache.key_dim, cache.value_dim)
        ]
        self._sides = [self._side() for _ in range(_SIDES)]
        parts = [(layer, part) for layer in range(len(model.caches)) for part in ("key", "value")]
        self._past = [past_name(*part) for part in parts]
        self._present = [present_name(*part) for part in parts]
        self._mask = np.zeros((batch, capacity), np.int64)
        self._length = 0

    def _side(self) -> list[Array]:
        return [np.zeros(self.batch * heads * self.capacity * dim, dtype) for heads, dim, dtype in self._caches]

    def reset(self) -> None:
        """Forget all sequences; the buffers are kept."""
        self.rewind(0)

    def rewind(self, tokens: int) -> None:
        """Forget all but the first tokens; see `CacheDecoder.rewind`."""
        assert tokens == 0 or self._mask[:, :tokens].all(), "rows that begin with padding"
        if tokens:
            # How far apart the heads lie follows from the length.
            for old, new in zip(self._views(self._sides[0], self._length), self._views(self._sides[1], tokens)):
                new[:] = old[:, :, :tokens]
            self._sides[:2] = self._sides[1], self._sides[0]
        self._length = tokens

    def prefill(self, ids: Array, lengths: Array, cut: int | None = None) -> Array:
        """Append several tokens to every sequence.

        Args:
            ids: Whole numbers [batch, tokens], padded on the right.
            lengths: How many of them count, [batch]; at least 1.
            cut: How many of the longest row's the first half has, 0 to read all at once; None lets `split_from` decide.

        Returns:
            Logits [batch, vocabulary] after every sequence's last token, until the next call.

        Raises:
            UsageError: They do not fit, or the shapes are wrong.
        """
        lengths = np.asarray(lengths, np.int64)
        require_prompts(ids, lengths, self.batch)
        longest, length = int(lengths.max()), self._length
        if length and lengths.min() != longest:
            raise UsageError("behind what they have read, all sequences must be given as many tokens")
        require_space(length + longest, self.capacity)
        columns = np.arange(longest)[None, :] - (longest - lengths)[:, None]
        present = columns >= 0
        before = self._mask[:, :length].sum(axis=1, keepdims=True)
        self._require_lengths(before[:, 0] + lengths)
        self._mask[:, length : length + longest] = present
        aligned_ids = np.take_along_axis(np.asarray(ids, np.int64), np.maximum(columns, 0), axis=1)
        if cut is None:
            cut = cut_of(longest, self.split_from)
        return self._append(np.where(present, aligned_ids, 0), before + np.maximum(columns, 0), cut)

    def step(self, tokens: Array) -> Array:
        """Append a token to every sequence.

        Args:
            tokens: Whole numbers [batch].

        Returns:
            Logits [batch, vocabulary] after it, until the next call.

        Raises:
            UsageError: The cache is full, or there is nothing to append to.
        """
        if not self._length:
            raise UsageError("give the prompt to prefill first")
        require_space(self._length + 1, self.capacity)
        positions = self._mask[:, : self._length].sum(axis=1, keepdims=True)
        self._require_lengths(positions[:, 0] + 1)
        self._mask[:, self._length] = 1
        return self._append(np.asarray(tokens, np.int64).reshape(-1, 1), positions)

    def _require_lengths(self, lengths: Array) -> None:
        """Check every row's length against the source model's rules; the program checks the longest one's."""
        for length in sorted(set(lengths.tolist())) if self._program.model.sizes else ():
            sizes = {BATCH: self.batch, SEQUENCE: length}
            rule = broken_rule(self._program.model.sizes, sizes)
            if rule is not None:
                raise UsageError(refusal("the model", sizes, rule))

    def _append(self, ids: Array, positions: Array, cut: int = 0) -> Array:
        if cut and len(self._sides) == _SIDES:
            self._sides.append(self._side())
        ends = [0, *([cut] if cut else []), ids.shape[1]]
        # From one side to the other, or by way of the third.
        sides = [self._sides[0], *self._sides[2:][: len(ends) - 2], self._sides[1]]
        feeds, destinations = [], []
        for part, (first, last) in enumerate(pairwise(ends)):
            total = self._length + last
            of_part = {
                INPUT_IDS: np.ascontiguousarray(ids[:, first:last]),
                POSITION_IDS: np.ascontiguousarray(positions[:, first:last]),
                ATTENTION_MASK: np.ascontiguousarray(self._mask[:, :total]),
                LOGIT_POSITIONS: np.full((self.batch, 1), last - first - 1, np.int64),
            }
            of_part = {name: value for name, value in of_part.items() if name in self._program.inputs}
            feeds.append(of_part | dict(zip(self._past, self._views(sides[part], self._length + first), strict=True)))
            destinations.append(dict(zip(self._present, self._views(sides[part + 1], total), strict=True)))
        logits = self._program.run_parts(feeds, destinations)[LOGITS]
        self._sides[:2] = self._sides[1], self._sides[0]
        self._length += ids.shape[1]
        return logits[:, 0]

    def _views(self, side: list[Array], tokens: int) -> list[Array]:
        return [
            store[: self.batch * heads * tokens * dim].reshape(self.batch, heads, tokens, dim)
            for (heads, dim, _), store in zip(self._caches, side)
        ]
