"""`kraken::capped_attention`: attention with soft-capping and sinks, which scaled_dot_product_attention lacks.

    scores = softcap * tanh(scale * q k^T / softcap) + mask          (soft-capping, Gemma 2, arXiv 2408.00118)
    y = softmax([scores, sink])[without the sink] v                  (attention sinks, gpt-oss, arXiv 2508.10925)

It is written in plain operators, so autograd, vmap, compilers and exporters see those.

Legend: B batch, H query heads, K KV heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("kraken", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "capped_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, float softcap=0.0, Tensor? sinks=None) -> Tensor"
)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with capped scores, or with a sink for each head, or both.

    Args:
        query: q_BHTD.
        key, value: k_BKSD, v_BKSD; K divides H.
        attn_mask: Added to the scores, or false where a key is not seen; broadcasts to [B, H, T, S].
        dropout_p: Must be 0.
        is_causal: Whether query t sees keys up to t only.
        scale: Factor on the scores, 1/sqrt(D) if None.
        softcap: Bound on the magnitude of every score; 0 means no cap.
        sinks: [H], a score for each head that takes probability from the keys and has no value.

    Returns:
        [B, H, T, D] of the value's dtype.
    """
    assert dropout_p == 0.0, "attention in eval mode drops nothing"
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        causal_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal_mask, float("-inf"))
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    if sinks is None:
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    columns = sinks.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
    shares = torch.softmax(torch.cat([scores, columns], dim=-1), dim=-1)
    return shares.narrow(-1, 0, key.shape[-2]).to(value.dtype) @ value


_library.impl("capped_attention", capped_attention, "CompositeImplicitAutograd")
