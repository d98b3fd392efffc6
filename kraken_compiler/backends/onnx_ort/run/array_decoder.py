"""Prefill and decode with a KV cache, on one device, in numpy."""

from __future__ import annotations

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
from kraken_compiler.backends.sequences import (
    Array,
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
    Every step reads one set of buffers and writes the other.

    Attributes:
        batch: Number of sequences.
        capacity: Most tokens of a sequence, prompt and new ones together.
        identical_on_all_ranks: False: nothing promises that ONNX Runtime makes the same of equal sums, to the last bit.
    """

    identical_on_all_ranks = False

    def __init__(self, program: DeviceProgram, batch: int, capacity: int) -> None:
        """Allocate the caches.

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
        self._program = program
        self._sides = [
            [
                (cache.heads, dim, np.zeros(batch * cache.heads * capacity * dim, cache.dtype))
                for cache in model.caches
                for dim in (cache.key_dim, cache.value_dim)
            ]
            for _ in range(_SIDES)
        ]
        parts = [(layer, part) for layer in range(len(model.caches)) for part in ("key", "value")]
        self._past = [past_name(*part) for part in parts]
        self._present = [present_name(*part) for part in parts]
        self._mask = np.zeros((batch, capacity), np.int64)
        self._length = 0

    def reset(self) -> None:
        """Forget all sequences; the buffers are kept."""
        self._length = 0

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """Read prompts into an empty decoder.

        Args:
            ids: Whole numbers [batch, tokens], padded on the right.
            lengths: How many of them count, [batch]; at least 1.

        Returns:
            Logits [batch, vocabulary] after every sequence's last token, until the next call.

        Raises:
            UsageError: They do not fit, or the shapes are wrong.
        """
        lengths = np.asarray(lengths, np.int64)
        require_prompts(ids, lengths, self.batch)
        longest = int(lengths.max())
        require_space(longest, self.capacity)
        self._length = 0
        columns = np.arange(longest)[None, :] - (longest - lengths)[:, None]
        present = columns >= 0
        self._require_lengths(lengths)
        self._mask[:, :longest] = present
        aligned_ids = np.take_along_axis(np.asarray(ids, np.int64), np.maximum(columns, 0), axis=1)
        return self._append(np.where(present, aligned_ids, 0), np.maximum(columns, 0))

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

    def _append(self, ids: Array, positions: Array) -> Array:
        total = self._length + ids.shape[1]
        feeds = {
            INPUT_IDS: ids,
            POSITION_IDS: positions,
            ATTENTION_MASK: np.ascontiguousarray(self._mask[:, :total]),
            LOGIT_POSITIONS: np.full((self.batch, 1), ids.shape[1] - 1, np.int64),
        }
        feeds = {name: value for name, value in feeds.items() if name in self._program.inputs}
        feeds |= dict(zip(self._past, self._views(0, self._length), strict=True))
        destinations = dict(zip(self._present, self._views(1, total), strict=True))
        logits = self._program.run(feeds, destinations)[LOGITS]
        self._sides.reverse()
        self._length = total
        return logits[:, 0]

    def _views(self, side: int, tokens: int) -> list[Array]:
        return [
            store[: self.batch * heads * tokens * dim].reshape(self.batch, heads, tokens, dim)
            for heads, dim, store in self._sides[side]
        ]
