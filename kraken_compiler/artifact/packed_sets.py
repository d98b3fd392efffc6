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
_MOST_POSITIONS = 1 << 26
"""More than any dim that is split column by column; what claims more is not unpacked."""


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
    if not isinstance(value, str) or size > _MOST_POSITIONS:
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


def unpacked_manifest(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest's JSON with its index sets unpacked; what is no index set is left to be checked by others.

    Raises:
        ValueError: One is damaged.
    """
    weights, records = content.get("weights"), content.get("assignment")
    if isinstance(weights, list):
        content = {**content, "weights": [_unpacked_weight(weight) for weight in weights]}
    if isinstance(records, list):
        content = {**content, "assignment": [_unpacked_record(record) for record in records]}
    return content


def _unpacked_weight(weight: Any) -> Any:
    if not isinstance(weight, Mapping) or not isinstance(weight.get("shards"), list):
        return weight
    shape = weight.get("source_shape")
    return {**weight, "shards": [_unpacked_shard(shard, shape) for shard in weight["shards"]]}


def _unpacked_shard(shard: Any, shape: Any) -> Any:
    dim = shard.get("dim") if isinstance(shard, Mapping) else None
    if type(dim) is not int or not isinstance(shape, list) or not 0 <= dim < len(shape):
        return shard
    return _with_lanes(shard, shape[dim])


def _unpacked_record(record: Any) -> Any:
    return _with_lanes(record, record.get("units")) if isinstance(record, Mapping) else record


def _with_lanes(record: Mapping[str, Any], size: Any) -> Mapping[str, Any]:
    if type(size) is not int or size < 0 or not isinstance(record.get("lanes"), list):
        return record
    return {**record, "lanes": [unpacked(lane, size) for lane in record["lanes"]]}
