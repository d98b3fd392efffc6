"""Small Transformers in plain torch, each written the way a different author would; no library's module names.

Shape legend: B batch, S sequence, D stream width, H query heads, K key/value heads, E head width, F FFN columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.builder import Builder

D, H, E, FFN, LAYERS, POSITIONS = 64, 8, 8, 96, 3, 64


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head; the blocks are what the models differ in."""

    def __init__(self, blocks: list[nn.Module], norm: nn.Module, vocab: int, *, positions: bool, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, D)
        self.positions = nn.Embedding(POSITIONS, D) if positions else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(D, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BSD = self.tokens(input_ids)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


# a: GPT with separate projections ------------------------------------------------------------------------------------


class GptBlock(nn.Module):
    """LayerNorm, separate q, k and v with biases, causal SDPA, GELU FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.norm2 = nn.LayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D), nn.Dropout(0.1))

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        y_BSD = self.norm1(x_BSD)
        q, k, v = (proj(y_BSD).view(batch, seq, H, E).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.o(y_BHSE.transpose(1, 2).reshape(batch, seq, D))
        return x_BSD + self.ffn(self.norm2(x_BSD))


def gpt() -> nn.Module:
    return Decoder([GptBlock() for _ in range(LAYERS)], nn.LayerNorm(D), 97, positions=True, tied=True)


# b: llama-like with fused projections --------------------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    """RMSNorm spelled out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x_BHSE: Tensor) -> Tensor:
    """Rotary position embedding over the whole head width, two halves rotated against each other."""
    seq, width = x_BHSE.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=x_BHSE.device) / width)
    angle = torch.arange(seq, device=x_BHSE.device)[:, None] * frequency[None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BHSE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class FusedLlamaBlock(nn.Module):
    """One matrix for q, k and v, one for gate and up; two KV heads repeated to eight."""

    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.pre_attention = RootMeanSquare(D)
        self.qkv = nn.Linear(D, (H + 2 * kv_heads) * E, bias=False)
        self.merge = nn.Linear(D, D, bias=False)
        self.pre_ffn = RootMeanSquare(D)
        self.gate_up = nn.Linear(D, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, D, bias=False)

    def attend(self, x_BSD: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        q, k, v = torch.split(self.qkv(x_BSD), [H * E, self.kv_heads * E, self.kv_heads * E], dim=-1)
        q_BHSE = rotate(q.view(batch, seq, H, E).transpose(1, 2))
        k_BKSE = rotate(k.view(batch, seq, self.kv_heads, E).transpose(1, 2))
        v_BKSE = v.view(batch, seq, self.kv_heads, E).transpose(1, 2)
        group = H // self.kv_heads
        k_BHSE, v_BHSE = k_BKSE.repeat_interleave(group, dim=1), v_BKSE.repeat_interleave(group, dim=1)
        y_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, is_causal=True)
        return self.merge(y_BHSE.transpose(1, 2).flatten(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attend(self.pre_attention(x_BSD))
        gate, up = self.gate_up(self.pre_ffn(x_BSD)).chunk(2, dim=-1)
        return x_BSD + self.down(F.silu(gate) * up)


def fused_llama() -> nn.Module:
    return Decoder([FusedLlamaBlock() for _ in range(LAYERS)], RootMeanSquare(D), 97, positions=False, tied=False)


# c: attention and FFN in parallel ------------------------------------------------------------------------------------


class ParallelBlock(nn.Module):
    """GPT-J style: one norm, both branches read it; attention by hand with a masked softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.out = nn.Linear(D, D)
        self.fc_in = nn.Linear(D, FFN)
        self.fc_out = nn.Linear(FFN, D)
        self.register_buffer("causal", torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril(), persistent=False)

    def attend(self, x_BSD: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        q = rotate(self.query(x_BSD).view(batch, seq, H, E).transpose(1, 2))
        k = rotate(self.key(x_BSD).view(batch, seq, H, E).transpose(1, 2))
        v = self.value(x_BSD).view(batch, seq, H, E).transpose(1, 2)
        scores_BHSS = q @ k.transpose(-1, -2) / math.sqrt(E)
        scores_BHSS = scores_BHSS.masked_fill(~self.causal[:seq, :seq], float("-inf"))
        y_BHSE = torch.softmax(scores_BHSS, dim=-1) @ v
        return self.out(y_BHSE.transpose(1, 2).contiguous().view(batch, seq, D))

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.norm(x_BSD)
        return x_BSD + self.attend(y_BSD) + self.fc_out(F.gelu(self.fc_in(y_BSD), approximate="tanh"))


def parallel() -> nn.Module:
    return Decoder([ParallelBlock() for _ in range(LAYERS)], nn.RMSNorm(D, eps=1e-6), 97, positions=False, tied=False)


# d: one KV head and ALiBi --------------------------------------------------------------------------------------------


class AlibiBlock(nn.Module):
    """Multi-query attention with a per-head linear position bias as the mask; ReLU FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * E)
        self.o = nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, FFN), nn.Linear(FFN, D)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, H + 1).float())

    def bias(self, seq: int) -> Tensor:
        """[H, S, S]: minus infinity in the future, minus slope times distance in the past."""
        position = torch.arange(seq, device=self.slopes.device)
        distance_SS = position[None, :] - position[:, None]
        bias_HSS = self.slopes[:, None, None] * distance_SS
        return bias_HSS.masked_fill(distance_SS > 0, float("-inf"))

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        y_BSD = self.norm1(x_BSD)
        q_BHSE = self.q(y_BSD).view(batch, seq, H, E).transpose(1, 2)
        k_B1SE, v_B1SE = self.kv(y_BSD).unsqueeze(1).chunk(2, dim=-1)
        k_BHSE, v_BHSE = k_B1SE.expand(-1, H, -1, -1), v_B1SE.expand(-1, H, -1, -1)
        y_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, attn_mask=self.bias(seq).unsqueeze(0))
        x_BSD = x_BSD + self.o(y_BHSE.transpose(1, 2).reshape(batch, seq, D))
        return x_BSD + self.down(torch.relu(self.up(self.norm2(x_BSD))))


def alibi() -> nn.Module:
    return Decoder([AlibiBlock() for _ in range(LAYERS)], nn.LayerNorm(D), 97, positions=False, tied=True)


# e: einsum and QK-norm -----------------------------------------------------------------------------------------------


class EinsumBlock(nn.Module):
    """Every projection of attention is an einsum over a tensor with a head dim; q and k are normed per head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.empty(D, H, E)) for _ in range(3))
        self.w_o = nn.Parameter(torch.empty(H, E, D))
        self.q_norm, self.k_norm = nn.RMSNorm(E), nn.RMSNorm(E)
        self.gate, self.up = nn.Linear(D, FFN, bias=False), nn.Linear(D, FFN, bias=False)
        self.down = nn.Linear(FFN, D, bias=False)

    def attend(self, x_BSD: Tensor) -> Tensor:
        q = self.q_norm(torch.einsum("bsd,dhe->bhse", x_BSD, self.w_q))
        k = self.k_norm(torch.einsum("bsd,dhe->bhse", x_BSD, self.w_k))
        v = torch.einsum("bsd,dhe->bhse", x_BSD, self.w_v)
        y_BHSE = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return torch.einsum("bhse,hed->bsd", y_BHSE, self.w_o)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attend(self.norm1(x_BSD))
        y_BSD = self.norm2(x_BSD)
        return x_BSD + self.down(F.gelu(self.gate(y_BSD)) * self.up(y_BSD))


def einsum() -> nn.Module:
    return Decoder([EinsumBlock() for _ in range(LAYERS)], nn.RMSNorm(D), 98, positions=False, tied=False)


# f: q, k and v interleaved head by head ------------------------------------------------------------------------------


class InterleavedBlock(nn.Module):
    """The fused projection's rows are ordered head, then q/k/v, then element; squared ReLU FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, FFN, bias=False), nn.Linear(FFN, D, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        qkv = self.qkv(self.ln1(x_BSD)).reshape(batch, seq, H, 3, E)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        y_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.proj(y_BHSE.permute(0, 2, 1, 3).reshape(batch, seq, -1))
        return x_BSD + self.down(F.relu(self.up(self.ln2(x_BSD))).square())


def interleaved() -> nn.Module:
    return Decoder([InterleavedBlock() for _ in range(LAYERS)], nn.LayerNorm(D), 97, positions=True, tied=False)


# g: in-place residual adds -------------------------------------------------------------------------------------------


class InPlaceBlock(GptBlock):
    """The GPT block with `+=` on the stream and an in-place activation."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        y_BSD = self.norm1(x_BSD)
        q, k, v = (proj(y_BSD).view(batch, seq, H, E).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD += self.o(y_BHSE.transpose(1, 2).reshape(batch, seq, D))
        hidden_BSF = self.ffn[0](self.norm2(x_BSD))
        hidden_BSF.relu_()
        x_BSD += self.ffn[2](hidden_BSF)
        return x_BSD


def in_place() -> nn.Module:
    return Decoder([InPlaceBlock() for _ in range(LAYERS)], nn.LayerNorm(D), 97, positions=True, tied=False)


_BUILDERS = (
    Builder("plain_gpt", gpt),
    Builder("plain_fused_llama", fused_llama, kv_heads=2),
    Builder("plain_parallel", parallel),
    Builder("plain_alibi", alibi, kv_heads=1),
    Builder("plain_einsum", einsum, vocab=98),
    Builder("plain_interleaved", interleaved),
    Builder("plain_in_place", in_place),
)

PLAIN: dict[str, Builder] = {builder.name: builder for builder in _BUILDERS}
