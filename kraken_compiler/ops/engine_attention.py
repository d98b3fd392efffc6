"""`kraken::engine_attention`: causal attention that a serving engine computes, with a KV cache of its own.

The operator says where attention stands in a graph and what goes in and out; whoever runs the graph puts its own in its
place. Window, scale and the like belong to the attention of that number, and not to the call.

Legend: T tokens of any number of sequences, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("kraken", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("engine_attention(Tensor query, Tensor key, Tensor value, int number) -> Tensor")

ENGINE_ATTENTION = torch.ops.kraken.engine_attention.default
"""(q_1HTD, k_1KTD, v_1KTD, number of the attention, in graph order) -> [1, H, T, D of the values]."""


def _fake(query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)


torch.library.register_fake("kraken::engine_attention", _fake, lib=_library)
