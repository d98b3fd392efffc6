"""The programs that vLLM runs, run by a rank without vLLM: its attention is ours, sequence by sequence.

What is compared so is all that is ours: the graphs, their cut, the tables, the order of tokens, the weights, and the
collectives of real ranks. Tokens of all sequences lie in one row, as vLLM hands them over.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Array, RankModel
from kraken_compiler.backends.lane_graph.insert_collectives import bind_collectives
from kraken_compiler.backends.lane_graph.run_graph import on_host
from kraken_compiler.backends.sequences import require_batch, require_prompts, require_space
from kraken_compiler.backends.vllm.format import HIDDEN, IDS, POSITIONS, EngineAttention
from kraken_compiler.backends.vllm.lane import EngineLane
from kraken_compiler.errors import UsageError
from kraken_compiler.ops.cached_attention import cached_attention
from kraken_compiler.ops.engine_attention import ENGINE_ATTENTION
from kraken_compiler.ranks.communicators.join import communicator_of

if TYPE_CHECKING:
    from kraken_compiler.ranks.session import Ranks

_CPU = torch.device("cpu")


class StubModel(RankModel):
    """A lane's programs on a CPU; see `RankModel`."""

    def __init__(self, artifact: Artifact, ranks: Ranks) -> None:
        """Load them.

        Args:
            artifact: An open artifact, whose files have been verified.
            ranks: This rank.
        """
        manifest = artifact.manifest
        assert manifest.cache is not None, "only programs with a KV cache are written"
        self.lane = EngineLane.load(artifact, ranks.rank)
        self.vocabulary = self.lane.record.vocabulary
        self.positions = manifest.cache.plan.limit or sys.maxsize
        self.ids_name, self.ids_dtype = manifest.inputs[0].name, getattr(torch, manifest.inputs[0].dtype)
        self.cache_dtypes = [getattr(torch, spec.dtype) for spec in manifest.cache.plan.caches]
        communicator = communicator_of(ranks, _CPU)
        self.batch: _Batch | None = None
        for node in self.lane.body.graph.find_nodes(op="call_function", target=ENGINE_ATTENTION):
            node.target = self._attend
        self._body, self._head = (bind_collectives(one, communicator) for one in (self.lane.body, self.lane.head))

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """See `RankModel.run`: every row is a sequence of its own, and all lie in one row."""
        ids = inputs[self.ids_name]
        rows, tokens = ids.shape
        self.batch = _Batch(self, rows, tokens)
        return [self.forward(ids.reshape(-1), [tokens] * rows, list(range(rows * tokens))).reshape(rows, tokens, -1)]

    def decoder(self, batch: int, capacity: int) -> StubDecoder:
        """See `RankModel.decoder`."""
        require_batch(batch, capacity, self.positions)
        return StubDecoder(self, batch, capacity)

    @torch.inference_mode()
    def forward(self, ids: Array, counts: Sequence[int], picks: Sequence[int]) -> Array:
        """Run body and head.

        Args:
            ids: New tokens of all sequences, one after the other.
            counts: How many every sequence has.
            picks: Of which of them logits are wanted.

        Returns:
            Logits [picks, vocabulary].
        """
        batch = self.batch
        assert batch is not None, "there are no sequences"
        begins = batch.begin(counts)
        positions = np.concatenate([begin + np.arange(count) for begin, count in zip(begins, counts)])
        feeds = {
            **self.lane.weights,
            **batch.tables,
            IDS: torch.tensor(ids, dtype=self.ids_dtype).reshape(1, -1),
            POSITIONS: torch.tensor(positions).reshape(1, -1),
        }
        (hidden,) = _call(self._body, feeds)
        (logits,) = _call(self._head, {**feeds, HIDDEN: hidden[:, list(picks)]})
        return on_host(logits[0])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
        assert self.batch is not None, "there are no sequences"
        return self.batch.attend(query, key, value, number)


class _Batch:
    """Sequences with their keys and values."""

    def __init__(self, model: StubModel, rows: int, capacity: int) -> None:
        self.model = model
        self.lengths = [0] * rows
        lane = model.lane
        self.prepared = lane.prepared(capacity, lane.weights, _CPU)
        self.tables = lane.tables(self.prepared)
        self._caches = [
            [
                (
                    torch.zeros(1, attention.kv_heads, capacity, attention.head_size, dtype=dtype),
                    torch.zeros(1, attention.kv_heads, capacity, attention.value_size, dtype=dtype),
                )
                for _ in range(rows)
            ]
            for attention, dtype in zip(lane.record.attentions, model.cache_dtypes, strict=True)
        ]
        self._counts: Sequence[int] = ()

    def begin(self, counts: Sequence[int]) -> list[int]:
        """Take new tokens of every sequence; returns where each goes on."""
        begins, self._counts = self.lengths, counts
        self.lengths = [length + count for length, count in zip(begins, counts, strict=True)]
        return begins

    def attend(self, query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
        attention = self.model.lane.record.attentions[number]
        results, start = [], 0
        for row, count in enumerate(self._counts):
            new = slice(start, start + count)
            start += count
            if count:
                parts = query[:, :, new], key[:, :, new], value[:, :, new]
                results.append(self._attend_row(parts, attention, self._caches[number][row], self.lengths[row]))
        return torch.cat(results, dim=2)

    def _attend_row(
        self,
        parts: tuple[Tensor, Tensor, Tensor],
        attention: EngineAttention,
        caches: tuple[Tensor, Tensor],
        end: int,
    ) -> Tensor:
        query, key, value = parts
        slots, begin = torch.arange(end), end - query.shape[2]
        return cached_attention(
            query,
            key,
            value,
            caches[0],
            caches[1],
            slots[begin:].reshape(1, -1),
            slots,
            slots[:begin],
            slopes=None if attention.slopes is None else self.prepared[attention.slopes],
            window=attention.window,
            scale=attention.scale,
            softcap=attention.softcap,
            sinks=None if attention.sinks is None else self.prepared[attention.sinks],
        )


class StubDecoder:
    """Sequences that grow; see `generate.decoder.Decoder`.

    Attributes:
        batch, capacity, identical_on_all_ranks: See there.
    """

    identical_on_all_ranks = False

    def __init__(self, model: StubModel, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self._model = model
        self._batch = _Batch(model, batch, capacity)

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """See `Decoder.prefill`: the longest prompt is read in two chunks, the first with the other prompts."""
        require_prompts(ids, lengths, self.batch)
        counts = [int(length) for length in lengths]
        require_space(max(map(sum, zip(self._batch.lengths, counts))), self.capacity)
        longest = counts.index(max(counts))
        first = [count // 2 if row == longest and count > 1 else count for row, count in enumerate(counts)]
        logits = self._append([row[:count] for row, count in zip(ids, first)])
        if first != counts:
            rest = [ids[row][first[row] : count] for row, count in enumerate(counts)]
            logits[longest] = self._append(rest)[0]
        return logits

    def step(self, tokens: Array) -> Array:
        """See `Decoder.step`."""
        if not all(self._batch.lengths):
            raise UsageError("give the prompt to prefill first")
        require_space(max(self._batch.lengths) + 1, self.capacity)
        return self._append(list(tokens.reshape(-1, 1)))

    def reset(self) -> None:
        """See `Decoder.reset`."""
        # What the caches hold lies behind what is seen, until it is written over.
        self._batch.lengths = [0] * self.batch

    def _append(self, rows: Sequence[Array]) -> Array:
        """Append to every sequence; returns the logits of the last token of each that got one."""
        self._model.batch = self._batch
        counts = [len(row) for row in rows]
        ends = [end - 1 for end, count in zip(np.cumsum(counts).tolist(), counts) if count]
        return self._model.forward(np.concatenate(rows), counts, ends)


def _call(module: fx.GraphModule, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    outputs: tuple[Tensor, ...] = module(*(feeds[name] for name in names))
    return outputs
