"""Index sets in a manifest: a few ranges as they are, many of them as one text.

Columns that were chosen one by one are thousands of ranges. A text holds a bit for every position, compressed by zlib,
in base64: a lane of a third of 1,536 columns takes 260 characters.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kraken_compiler.ir.index_set import IndexSet, from_indices, to_indices

_MOST_RANGES = 16


def packed(index_set: IndexSet, size: int) -> IndexSet | str:
    """An index set as a manifest holds it.

    Args:
        index_set: Of the positions 0 to `size`.
        size: How many positions there are.
    """
    if len(index_set) <= _MOST_RANGES:
        return index_set
    bits = np.zeros(size, dtype=bool)
    bits[to_indices(index_set)] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode("ascii")


def unpacked(value: object, size: int) -> object:
    """What `packed` was given; anything but a text is left to be checked by others.

    Raises:
        ValueError: The text is no index set of so many positions.
    """
    if not isinstance(value, str):
        return value
    length = -(-size // 8)
    try:
        decompressor = zlib.decompressobj()
        content = decompressor.decompress(base64.b64decode(value, validate=True), length + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError("a lane's positions are damaged") from error
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))
    if len(content) != length or not decompressor.eof or bits[size:].any():
        raise ValueError(f"a lane's positions are not those of {size}")
    return from_indices(np.flatnonzero(bits[:size]).tolist())


def unpacked_weight(weight: object) -> object:
    """A row of the weight table as it is in a manifest's JSON, with its index sets unpacked."""
    if not isinstance(weight, Mapping):
        return weight
    shape = weight.get("source_shape")
    return {**weight, "shards": [_unpacked_shard(shard, shape) for shard in weight.get("shards") or ()]}


def _unpacked_shard(shard: Any, shape: Any) -> Any:
    """A shard with its index sets unpacked, if it has any and says of which dim."""
    if not isinstance(shard, Mapping) or not isinstance(shard.get("lanes"), list) or not isinstance(shape, list):
        return shard
    dim = shard.get("dim")
    if type(dim) is not int or not 0 <= dim < len(shape) or type(shape[dim]) is not int or shape[dim] < 0:
        return shard
    return {**shard, "lanes": [unpacked(lane, shape[dim]) for lane in shard["lanes"]]}
