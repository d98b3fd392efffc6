"""Prefill and decode with a KV cache, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kraken_compiler.backends.lane_graph.run_graph import on_host, run_tables
from kraken_compiler.backends.sequences import (
    Array,
    cut_of,
    require_batch,
    require_memory,
    require_prompts,
    require_space,
    token_bytes,
)
from kraken_compiler.backends.torch_dist.cached_graphs import CachedGraphs
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.cache import CUT, FIRST_SLOTS, PAST, PICKS, POSITIONS, SECOND_PAST, SLOTS

RunStep = Callable[..., tuple[Tensor, ...]]
"""The step graph: the weights, then its inputs."""


class CachedDecoder:
    """A batch of sequences that grow; every rank must call it together. See `generate.decoder.Decoder`.

    Attributes:
        batch: Number of sequences.
        capacity: Most tokens of a sequence, prompt and new ones together.
        identical_on_all_ranks: True if all ranks get bit-identical logits.
        can_split: True if there is a graph that reads tokens as two halves.
        split_from: The fewest tokens that are; None if all are read at once.
    """

    def __init__(
        self,
        steps: Sequence[RunStep],
        graphs: CachedGraphs,
        weights: Sequence[Tensor],
        *,
        batch: int,
        capacity: int,
        device: torch.device,
        identical_on_all_ranks: bool = False,
        require_lengths: Callable[[Sequence[int]], None] = lambda lengths: None,
    ) -> None:
        """Allocate the caches and compute the tables.

        Args:
            steps: The step graph with its collectives bound, and that on two halves, if there is one.
            graphs: How it is fed, and the graph of the tables.
            weights: This lane's weights, in the order of the placeholders.
            batch, capacity: See the class.
            device: Where it all lives.
            identical_on_all_ranks: See the class.
            require_lengths: Raises a `UsageError` if the model takes no sequences of these lengths.

        Raises:
            UsageError: The capacity is beyond what the model's positions or the memory allow, or a size is not
                positive.
        """
        plan, inputs = graphs.plan, graphs.inputs
        require_batch(batch, capacity, plan.limit)
        bytes_per_token = token_bytes(plan.caches, lambda dtype: getattr(torch, dtype).itemsize)
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        require_memory(batch * capacity * bytes_per_token, capacity, memory)
        self.batch, self.capacity, self.identical_on_all_ranks = batch, capacity, identical_on_all_ranks
        self._steps, self._weights, self._device = steps, list(weights), device
        self.can_split = len(steps) > 1
        self.split_from: int | None = None
        self._require_lengths = require_lengths
        # Compiled code writes into caches outside of inference mode, where inference tensors must not be written to.
        with torch.inference_mode(False):
            self._every_slot = torch.arange(capacity, device=device)
            self._fixed_inputs = dict(
                zip(
                    plan.tables,
                    () if graphs.tables is None else run_tables(graphs.tables, weights, capacity, device),
                    strict=True,
                )
            )
            for cache in plan.caches:
                dtype: torch.dtype = getattr(torch, cache.dtype)
                for name, dim in ((cache.key, cache.key_dim), (cache.value, cache.value_dim)):
                    # Zeros and not just memory: what is masked is still multiplied, and garbage may be a NaN.
                    store = torch.zeros(batch, cache.heads, capacity, dim, dtype=dtype, device=device)
                    self._fixed_inputs[name] = store
        self._names = [spec.name for spec in (*inputs, *graphs.split_inputs)]
        self._unsplit_inputs = len(inputs)
        self._tokens_dtype: torch.dtype = getattr(torch, inputs[0].dtype)
        self._lengths = [0] * batch

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of every sequence."""
        return tuple(self._lengths)

    def reset(self) -> None:
        """Forget all sequences; the buffers are kept."""
        self.rewind(0)

    def rewind(self, tokens: int) -> None:
        """Forget all but the first tokens; see `CacheDecoder.rewind`."""
        assert tokens == 0 or tokens <= min(self._lengths), f"{tokens} tokens of {self._lengths}"
        self._lengths = [tokens] * self.batch

    def prefill(self, ids: Array, lengths: Array, cut: int | None = None) -> Array:
        """Append several tokens to every sequence; see `Decoder.prefill`.

        Args:
            ids: int64 [batch, tokens], right-padded.
            lengths: int64 [batch], how many of them count; at least 1.
            cut: How many of them the first half has, 0 to read all at once; None lets `split_from` decide.

        Returns:
            Logits [batch, vocabulary] after every sequence's last token.

        Raises:
            UsageError: They do not fit into the cache, or the shapes are wrong.
        """
        require_prompts(ids, lengths, self.batch)
        picks = torch.tensor(lengths, device=self._device).view(-1, 1) - 1
        if cut is None:
            cut = cut_of(ids.shape[1], self.split_from)
        return self._append(ids, picks, lengths.tolist(), cut)

    def step(self, tokens: Array) -> Array:
        """Append one token to every sequence; see `Decoder.step`.

        Args:
            tokens: int64 [batch].

        Returns:
            Logits [batch, vocabulary] after it.

        Raises:
            UsageError: The cache is full, or there is nothing to append to.
        """
        if not all(self._lengths):
            raise UsageError("give the prompt to prefill first")
        picks = torch.zeros(self.batch, 1, dtype=torch.int64, device=self._device)
        return self._append(tokens.reshape(-1, 1), picks, [1] * self.batch)

    @torch.inference_mode()
    def _append(self, ids: Array, picks: Tensor, counts: Sequence[int], cut: int = 0) -> Array:
        tokens, longest = ids.shape[1], max(self._lengths)
        total = max(length + count for length, count in zip(self._lengths, counts))
        total = max(total, longest + tokens)
        require_space(total, self.capacity)
        self._require_lengths([length + count for length, count in zip(self._lengths, counts)])
        alike, slots = longest == min(self._lengths), longest + tokens
        if alike:
            positions = self._every_slot[longest:slots].view(1, -1)
        else:
            starts = torch.tensor(self._lengths, device=self._device).view(-1, 1)
            positions = starts + self._every_slot[:tokens]
        past = longest if alike else 0
        feeds = {
            **self._fixed_inputs,
            POSITIONS: positions,
            SLOTS: self._every_slot[:slots],
            PAST: self._every_slot[:past],
            PICKS: picks,
            self._names[0]: torch.tensor(ids, dtype=self._tokens_dtype, device=self._device),
        }
        names = self._names[: self._unsplit_inputs]
        if cut:
            feeds |= self._halves(cut, slots, past, contiguous=alike)
            names = self._names
        run = self._steps[1 if cut else 0]
        (logits,) = run(*self._weights, *(feeds[name] for name in names))
        self._lengths = [length + count for length, count in zip(self._lengths, counts)]
        return on_host(logits[:, 0])

    def _halves(self, cut: int, slots: int, past: int, *, contiguous: bool) -> dict[str, Tensor]:
        """What the graph on two halves is fed besides: the sizes that a step graph of each would be given."""
        seen_by_first, past_of_second = (past + cut, past + cut) if contiguous else (slots, 0)
        sizes = {CUT: cut, FIRST_SLOTS: seen_by_first, SECOND_PAST: past_of_second}
        return {name: self._every_slot[:size] for name, size in sizes.items()}
