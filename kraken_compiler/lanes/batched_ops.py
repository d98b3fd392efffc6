"""Operators as segments call them: functions that torch.vmap batches over lanes, and that follow autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kraken_compiler.ops.capped_attention import capped_attention
from kraken_compiler.ops.dequantize import dequantize
from kraken_compiler.ops.expert_linear import autocast_expert_linear
from kraken_compiler.ops.lane_embedding import lane_embedding
from kraken_compiler.ops.op_sets import ATTENTION, CAPPED_ATTENTION, DEQUANTIZE, EXPERT_LINEAR, LANE_EMBEDDING
from kraken_compiler.surroundings import autocast_is_on


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """scaled_dot_product_attention, with its arguments.

    Autocast knows that operator, but not ours, whose batching rule it does not reach into.
    """
    if autocast_is_on(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (operand.to(dtype) for operand in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    mixed: Tensor = torch.ops.kraken.attention.default(query, key, value, attn_mask, *rest, **options)
    return mixed


BATCHED_AS: dict[Any, Callable[..., Tensor]] = {
    ATTENTION: _attention,
    CAPPED_ATTENTION: capped_attention,
    DEQUANTIZE: dequantize,
    EXPERT_LINEAR: autocast_expert_linear,
    LANE_EMBEDDING: lane_embedding,
}
