"""Attention as segments call it: with a batching rule for lanes, and under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kraken_compiler.ir import ops  # noqa: F401  (registers kraken::attention)


def lane_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """scaled_dot_product_attention, with its arguments.

    Autocast knows that operator, but not ours, whose batching rule it does not reach into.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (operand.to(dtype) for operand in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    mixed: Tensor = torch.ops.kraken.attention.default(query, key, value, attn_mask, *rest, **options)
    return mixed
