"""Small decoders whose parts can be exchanged, one layer by default.

Shape legend: B batch, S sequence, D stream width, H query heads, K key/value heads, E head width, F FFN columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, D, H, E, COLUMNS = 67, 16, 4, 4, 24

Branch = Callable[[], nn.Module]


class Attention(nn.Module):
    """Separate q, k and v, `kv_heads` of them shared by groups of query heads, with biases."""

    def __init__(self, kv_heads: int = H) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q, self.o = nn.Linear(D, H * E), nn.Linear(H * E, D)
        self.k, self.v = nn.Linear(D, kv_heads * E), nn.Linear(D, kv_heads * E)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, S, E], k and v [B, K, S, E]."""
        batch, seq, _ = x_BSD.shape
        q, k, v = (p(x_BSD).view(batch, seq, -1, E).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, S, E]"""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BHSE = self.mix(*self.project(x_BSD))
        return self.o(y_BHSE.transpose(1, 2).reshape(*x_BSD.shape[:2], -1))


class Ffn(nn.Module):
    """Plain two-layer FFN with biases."""

    def __init__(self, columns: int = COLUMNS) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, columns), nn.Linear(columns, D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)))


class Block(nn.Module):
    """Pre-norm layer, sequential or parallel."""

    def __init__(self, attention: nn.Module, ffn: nn.Module, parallel: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention, self.ffn, self.parallel = attention, ffn, parallel

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.parallel:
            return x_BSD + self.attention(self.norm1(x_BSD)) + self.ffn(self.norm2(x_BSD))
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD))
        return x_BSD + self.ffn(self.norm2(x_BSD))


class Gpt(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(
        self, layers: int = 1, *, attention: Branch = Attention, ffn: Branch = Ffn, parallel: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(Block(attention(), ffn(), parallel) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.tokens(ids)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


class FusedQkv(Attention):
    """One projection for q, k and v. `layout` says how its rows are ordered: "contiguous" (all of q, then k, then v),
    "interleaved" (head, then q/k/v, then element) or "grouped" (KV head, then its queries, its key, its value)."""

    def __init__(self, layout: str, kv_heads: int = H) -> None:
        super().__init__(kv_heads)
        del self.q, self.k, self.v
        self.layout = layout
        self.qkv = nn.Linear(D, (H + 2 * kv_heads) * E)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = x_BSD.shape
        fused = self.qkv(x_BSD)
        group, kv = H // self.kv_heads, self.kv_heads
        if self.layout == "contiguous":
            q, k, v = fused.split([H * E, kv * E, kv * E], dim=-1)
        elif self.layout == "interleaved":
            q, k, v = fused.view(batch, seq, H, 3, E).unbind(3)
        else:
            grouped = fused.view(batch, seq, kv, group + 2, E)
            q, k, v = grouped[..., :group, :], grouped[..., group, :], grouped[..., group + 1, :]
        q, k, v = (x.reshape(batch, seq, -1, E).transpose(1, 2) for x in (q, k, v))
        return q, k, v


class GatedFfn(nn.Module):
    """Fused gate and up: the two halves of one projection ("chunk"), or alternating columns ("interleaved")."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.gate_up, self.down = nn.Linear(D, 2 * COLUMNS, bias=False), nn.Linear(COLUMNS, D, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        fused = self.gate_up(x_BSD)
        if self.layout == "chunk":
            gate, up = fused.chunk(2, dim=-1)
        else:
            gate, up = fused[..., ::2], fused[..., 1::2]
        return self.down(F.silu(gate) * up)


class AlibiAttention(Attention):
    """A per-head linear bias on distance, computed outside the projections."""

    def __init__(self, kv_heads: int = H) -> None:
        super().__init__(kv_heads)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, H + 1).float())

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[2])
        bias_HSS = self.slopes[:, None, None] * (position[None, :] - position[:, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_HSS.unsqueeze(0))


class GainAttention(Attention):
    """One learned factor per head on the attention's output, and a norm with per-head weights on q."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.q_gain = nn.Parameter(torch.ones(H)), nn.Parameter(torch.ones(H, 1, E))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.layer_norm(q, [E]) * self.q_gain
        return super().mix(q, k, v) * self.gain[:, None, None]


class NormOverHeads(Attention):
    """QK-norm over all heads together: each lane would need the others' values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(H * E)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = x_BSD.shape
        q, k, v = self.q_norm(self.q(x_BSD)), self.k(x_BSD), self.v(x_BSD)
        q, k, v = (x.view(batch, seq, H, E).transpose(1, 2) for x in (q, k, v))
        return q, k, v


class TalkingHeads(Attention):
    """The heads' outputs are mixed with each other by a learned matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.eye(H))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y_BSEH = super().mix(q, k, v).permute(0, 2, 3, 1)
        return (y_BSEH @ self.talk).permute(0, 3, 1, 2)


class WideAttention(Attention):
    """q is normalised over all heads, k over both KV heads together."""

    def __init__(self) -> None:
        super().__init__(2)
        self.q_norm, self.k_norm = nn.LayerNorm(H * E), nn.RMSNorm(2 * E, eps=1e-6)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (
            norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (-1, E)).transpose(1, 2)
            for norm, x in ((self.q_norm, q), (self.k_norm, k))
        )
        return super().mix(q, k, v)


class WideFfn(Ffn):
    """The FFN's inside is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(COLUMNS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x_BSD))))
