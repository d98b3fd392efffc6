"""Cached attention as ONNX has it: the past comes in, the past with the new tokens goes out.

`kraken_onnx::attention_mask` makes the mask that all attentions of a kind share, `kraken_onnx::attention` is ONNX's own
`Attention`. They exist to be exported: they have shapes, and run as what they mean, but nothing computes with them.

Legend: B batch, H query heads, K KV heads, T new tokens, P tokens before them, S = P + T, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.ops.capped_attention import capped_attention

_library: Any = torch.library.Library("kraken_onnx", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "attention_mask(Tensor attention_mask, Tensor input_ids, Tensor? slopes, int window, ScalarType dtype) -> Tensor"
)
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor past_key, Tensor past_value, "
    "float? scale=None) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "capped_attention(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor past_key, Tensor past_value, "
    "float scale, float softcap, int kv_heads, int group, int key_dim, int dim, bool by_head, Tensor? sinks=None) "
    "-> (Tensor, Tensor, Tensor)"
)


def _mask(attention_mask: Tensor, input_ids: Tensor, slopes: Tensor | None, window: int, dtype: torch.dtype) -> Tensor:
    """The mask that is added to the scores, [B, 1 or H, T, S]; minus infinity where a query does not see.

    Args:
        attention_mask: [B, S], 0 where there is no token.
        input_ids: [B, T].
        slopes: ALiBi slopes, [H].
        window: How many positions a query sees, itself included; 0 means all.
        dtype: Of the result.
    """
    slots = torch.arange(attention_mask.shape[1])
    places = slots[-input_ids.shape[1] :, None]
    visible = (slots <= places) & (attention_mask != 0)[:, None, None, :]
    if window:
        visible = visible & (slots > places - window)
    # Padding sees itself: a query that sees nothing would make NaNs, and NaNs spread through the cache.
    visible = visible | (slots == places)
    bias = torch.zeros((), dtype=dtype)
    if slopes is not None:
        bias = ((slots - places) * slopes[:, None, None]).to(dtype)
    return bias.masked_fill(~visible, -torch.inf)


def _mask_shape(
    attention_mask: Tensor, input_ids: Tensor, slopes: Tensor | None, window: int, dtype: torch.dtype
) -> Tensor:
    heads = 1 if slopes is None else slopes.shape[0]
    shape = (attention_mask.shape[0], heads, input_ids.shape[1], attention_mask.shape[1])
    return attention_mask.new_empty(shape, dtype=dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=grouped)
    return out, keys, values


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    scale: float,
    softcap: float,
    kv_heads: int,
    group: int,
    key_dim: int,
    dim: int,
    by_head: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kraken::capped_attention`; K, H / K and both D are numbers, for ONNX reshapes by them.

    `by_head` says that every head has a mask of its own.
    """
    keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    return capped_attention(query, keys, values, mask, scale=scale, softcap=softcap, sinks=sinks), keys, values


def _attention_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    total = mask.shape[3]
    batch, heads, tokens, _ = query.shape
    return (
        query.new_empty((batch, heads, tokens, value.shape[3])),
        key.new_empty((batch, key.shape[1], total, key.shape[3])),
        value.new_empty((batch, value.shape[1], total, value.shape[3])),
    )


def _capped_attention_shape(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_shape(query, key, value, mask, past_key, past_value)


for _name, _run, _fake in (
    ("attention_mask", _mask, _mask_shape),
    ("attention", _attention, _attention_shape),
    ("capped_attention", _capped_attention, _capped_attention_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kraken_onnx::{_name}", _fake, lib=_library)
