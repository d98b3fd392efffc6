"""Calls of `kraken::cached_attention` and what they must give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.ops import cached_attention  # noqa: F401  (registers the op)


def behind_a_past(
    kv_heads: int, *, past: int = 11, tokens: int = 6, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Tokens read behind a past, and the same tokens read with it at once: [2, 8, tokens, 16] each."""
    generator = torch.Generator().manual_seed(0)
    total = past + tokens

    def random(heads: int) -> Tensor:
        return torch.randn(2, heads, total, 16, generator=generator).to(device, dtype)

    query, key, value = random(8), random(kv_heads), random(kv_heads)
    caches = [torch.zeros(2, kv_heads, 32, 16, dtype=dtype, device=device) for _ in range(2)]
    for first, end in ((0, past), (past, total)):
        part = slice(first, end)
        have = torch.ops.kraken.cached_attention(
            *(one[:, :, part] for one in (query, key, value)),
            *caches,
            torch.arange(first, end, device=device)[None],
            torch.arange(end, device=device),
            torch.arange(first, device=device),
        )
    repeated = (one.repeat_interleave(8 // kv_heads, dim=1) for one in (key, value))
    want = F.scaled_dot_product_attention(query, *repeated, is_causal=True)
    return have, want[:, :, past:]
