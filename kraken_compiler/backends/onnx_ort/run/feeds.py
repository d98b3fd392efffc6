"""The feeds of a device's model for whole sequences at once, without a past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kraken_compiler.backends.onnx_ort.format import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    past_name,
)
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel

Array = npt.NDArray[Any]


def whole_feeds(model: DeviceModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds for the logits of every token of whole sequences.

    Args:
        model: The device file.
        inputs: The source model's inputs by name; of a language model with a KV cache only the token ids,
            [batch, sequence].

    Returns:
        An array for every input of the model.
    """
    if model.caches is None:
        return {name: np.ascontiguousarray(value) for name, value in inputs.items()}
    (ids,) = inputs.values()
    batch, tokens = ids.shape
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int64), (batch, tokens)).copy()
    feeds = {
        INPUT_IDS: np.ascontiguousarray(ids, np.int64),
        POSITION_IDS: positions,
        ATTENTION_MASK: np.ones((batch, tokens), np.int64),
        LOGIT_POSITIONS: positions,
    }
    for layer, cache in enumerate(model.caches):
        for part, dim in (("key", cache.key_dim), ("value", cache.value_dim)):
            feeds[past_name(layer, part)] = np.zeros((batch, cache.heads, 0, dim), cache.dtype)
    input_names = {value.name for value in model.proto.graph.input}
    return {name: value for name, value in feeds.items() if name in input_names}
