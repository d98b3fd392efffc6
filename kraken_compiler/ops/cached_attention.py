"""`kraken::cached_attention`: causal attention that keeps its keys and values for the tokens to come.

One op serves prefill and decode, on CPU and CUDA. It writes the new keys and values into preallocated caches in place
and attends with scaled_dot_product_attention. What it has to do follows from shapes alone, so nothing is read back from
the device:

    past + tokens == slots     contiguous: the new tokens of every row sit at past, past + 1, ...; the caches are cut to
                               `slots`, and a fresh prefill (past == 0) needs neither the caches nor a mask
    else                       positional: every token goes where `positions` says and sees the slots up to there; used
                               for rows of different lengths

Legend: B batch, H query heads, K KV heads, T new tokens, C capacity, L slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kraken_compiler.ops.capped_attention import capped_attention

_library: Any = torch.library.Library("kraken", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor positions, Tensor slots, Tensor past, Tensor? slopes=None, int window=0, float? scale=None, "
    "float softcap=0.0, Tensor? sinks=None) -> Tensor"
)

CACHED_ATTENTION = torch.ops.kraken.cached_attention.default


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    past: Tensor,
    slopes: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append keys and values to the caches and attend causally.

    Args:
        query: q_BHTD.
        key, value: k_BKTD, v_BKTD; K divides H.
        key_cache, value_cache: [B, K, C, D]; written in place.
        positions: int64 [B, T], or [1, T] where all rows are alike. Slot of every token; also its position.
        slots: int64 [L], 0 to L - 1: the part of the caches that may be seen.
        past: Its length is the number of tokens before these, if all rows have as many; else it is empty.
        slopes: ALiBi slopes, float32 [H].
        window: How many positions a query sees, itself included; 0 means all.
        scale: Factor on the scores, 1/sqrt(D) if None.
        softcap, sinks: See `kraken::capped_attention`.

    Returns:
        [B, H, T, D] of the query's dtype.
    """
    tokens, length, before = query.shape[2], slots.shape[0], past.shape[0]
    if before + tokens != length:
        rows = torch.arange(query.shape[0], device=query.device)[:, None]
        index = (rows, slice(None), positions.expand(query.shape[0], tokens))
        key_cache[index] = key.transpose(1, 2)
        value_cache[index] = value.transpose(1, 2)
    else:
        key_cache[:, :, before:length] = key
        value_cache[:, :, before:length] = value
    if softcap or sinks is not None:
        bias = _bias(positions, slots, slopes, window, query.dtype)
        visible = key_cache[:, :, :length], value_cache[:, :, :length]
        return capped_attention(query, *visible, bias, scale=scale, softcap=softcap, sinks=sinks)
    if before + tokens != length:
        bias = _bias(positions, slots, slopes, window, query.dtype)
        return _attend(query, key_cache[:, :, :length], value_cache[:, :, :length], bias, scale)
    whole = not window or window >= length
    if before == 0 and whole and slopes is None:
        return _grouped_attention(query, key, value, scale=scale, is_causal=tokens > 1)
    first = length - window if tokens == 1 and not whole else 0
    keys, values, slots = key_cache[:, :, first:length], value_cache[:, :, first:length], slots[first:]
    if tokens == 1 and slopes is None:
        return _attend(query, keys, values, None, scale)
    if whole and slopes is None:
        bias = causal_lower_right(tokens, length) if _knows_lower_right(query) else _bias_behind(before, query)
    else:
        bias = _bias(positions, slots, slopes, 0 if whole else window, query.dtype)
    return _attend(query, keys, values, bias, scale)


def _knows_lower_right(query: Tensor) -> bool:
    """True if a kernel of the device sees causally behind a past without a mask: those for CPUs do not."""
    return query.is_cuda


def _bias_behind(past: int, query: Tensor) -> Tensor:
    """The bias of queries that see all of a past and what stands before them, [1, 1, T, past + T].

    What `_bias` makes of such positions, at a fifth of the time: of a past there is nothing to compare.
    """
    tokens = query.shape[2]
    bias = query.new_zeros(1, 1, tokens, past + tokens)
    bias[..., past:] = query.new_full((tokens, tokens), -torch.inf).triu_(1)
    return bias


def _bias(positions: Tensor, slots: Tensor, slopes: Tensor | None, window: int, dtype: torch.dtype) -> Tensor:
    """The bias that is added to the scores, [1 or B, 1 or H, T, L]: minus infinity for what a query does not see."""
    places = positions[:, None, :, None]
    visible = slots <= places
    if window:
        visible = visible & (slots > places - window)
    if slopes is None:
        bias = torch.zeros((), dtype=dtype, device=slots.device)
    else:
        bias = ((slots - places) * slopes[:, None, None]).to(dtype)
    return bias.masked_fill(~visible, -torch.inf)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    batch, heads, tokens, dim = query.shape
    kv_heads = keys.shape[1]
    if tokens > 1 or heads == kv_heads:
        return _grouped_attention(query, keys, values, bias, scale=scale)
    # The heads of a group are like so many queries of their KV head, and no key has to be repeated.
    group = heads // kv_heads
    if bias is not None and bias.shape[1] != 1:
        bias = bias.reshape(bias.shape[0], kv_heads, group, -1)
    elif bias is not None:
        bias = bias.expand(-1, -1, group, -1)
    out = F.scaled_dot_product_attention(query.reshape(batch, kv_heads, group, dim), keys, values, bias, scale=scale)
    return out.reshape(batch, heads, 1, -1)


def _grouped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None,
    is_causal: bool = False,
) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    return F.scaled_dot_product_attention(
        query, keys, values, bias, is_causal=is_causal, scale=scale, enable_gqa=group > 1
    )


def _fake(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)


def _tokens_first_attention(*operands: Any, **options: Any) -> Tensor:
    """`cached_attention` in the one layout that compiled code may rely on: tokens before heads, as the next layer's."""
    return cached_attention(*operands, **options).transpose(1, 2).contiguous().transpose(1, 2)


_library.impl("cached_attention", _tokens_first_attention, "CompositeExplicitAutograd")
torch.library.register_fake("kraken::cached_attention", _fake, lib=_library)
