"""The weight table: which part of every source tensor each lane owns.

Legend: a *source* tensor is one of the captured model; a *local* tensor is the part of it that one lane holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kraken_compiler.ir.index_set import IndexSet, size
from kraken_compiler.ir.source_reader import SourceReader

if TYPE_CHECKING:
    # Only methods that handle tensors need torch, and import it: reading a table must not.
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class DimShard:
    """The positions of dimension `dim` that each lane keeps, one `IndexSet` per lane.

    Lanes may overlap (replicated KV heads). A lane that keeps fewer positions than the others is padded with zeros
    at the end (a vocabulary that the degree does not divide).
    """

    dim: int
    lanes: tuple[IndexSet, ...]

    @property
    def local_size(self) -> int:
        return max(size(index_set) for index_set in self.lanes)


@dataclass(frozen=True)
class WeightSpec:
    """One weight placeholder of the graph and where its values come from.

    Attributes:
        name: Placeholder name in the graph, unique.
        source: Name of the tensor in the weight store (the source model's qualified name) or in `Program.constants`.
        source_shape: Shape of the source tensor.
        dtype: torch dtype name without the prefix, e.g. "bfloat16".
        kind: "parameter" (trainable), "buffer" or "constant".
        shards: The dims that are split; empty means every lane holds the whole tensor.
        scale: Factor on the values of every lane (1/N for a bias that all lanes add before a sum).
    """

    name: str
    source: str
    source_shape: tuple[int, ...]
    dtype: str
    kind: str
    shards: tuple[DimShard, ...] = ()
    scale: float = 1.0

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def shared(self) -> bool:
        """True if every lane holds the same whole tensor."""
        return not self.shards

    @property
    def shape(self) -> tuple[int, ...]:
        """Local shape, the same on every lane."""
        shape = list(self.source_shape)
        for shard in self.shards:
            shape[shard.dim] = shard.local_size
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the local tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def take(self, source: Tensor, lane: int) -> Tensor:
        """Cut lane `lane`'s part out of the source tensor.

        Args:
            source: The whole source tensor, shape `source_shape`.
            lane: Lane number, 0-based.

        Returns:
            A contiguous tensor of shape `shape` that shares no memory with `source` when it is a part of it.
        """
        import torch

        local = source
        for shard in self.shards:
            pieces = [local.narrow(shard.dim, start, stop - start) for start, stop in shard.lanes[lane]]
            padding = shard.local_size - size(shard.lanes[lane])
            if padding:
                pad_shape = list(local.shape)
                pad_shape[shard.dim] = padding
                pieces.append(local.new_zeros(pad_shape))
            local = pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=shard.dim)
        return self._apply_scale(local)

    @property
    def is_cut_by_rows(self) -> bool:
        """True if every lane's part is rows of the source tensor, or all of it: `take_rows` gives it row by row."""
        return bool(self.source_shape) and [shard.dim for shard in self.shards] in ([], [0])

    def take_rows(self, rows: Tensor, start: int, lane: int) -> Tensor:
        """Cut lane `lane`'s part out of some rows of the source tensor; all rows in their order give `take`.

        Args:
            rows: Rows `start`, `start + 1`, ... of the source tensor.
            start: Number of the first.
            lane: Lane number, 0-based.
        """
        import torch

        stop, last = start + len(rows), self.source_shape[0]
        index_set = self.shards[0].lanes[lane] if self.shards else ((0, last),)
        padding = self.shape[0] - size(index_set)
        pieces = [
            rows[max(first, start) - start : min(end, stop) - start]
            for first, end in index_set
            if first < stop and start < end
        ]
        if padding and stop == last:
            pieces.append(rows.new_zeros((padding, *rows.shape[1:])))
        return self._apply_scale(pieces[0] if len(pieces) == 1 else torch.cat([rows[:0], *pieces]))

    def _apply_scale(self, local: Tensor) -> Tensor:
        return (local if self.scale == 1.0 else local * self.scale).contiguous()


def lane_weights(table: Mapping[str, WeightSpec], lane: int, read: SourceReader) -> dict[str, Tensor]:
    """Every weight of one lane, read one source tensor at a time.

    Args:
        table: Placeholder name -> spec.
        lane: Lane number, 0-based.
        read: Gives the whole source tensor for a source name.
    """
    return {name: spec.take(read(spec.source), lane) for name, spec in table.items()}
