"""Small models that put their norms elsewhere than before the branches. Shape legend in `plain.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.builder import Builder
from tests.zoo.plain import FFN, LAYERS, D, Decoder, E, GptBlock, H


def attend(block: GptBlock, x_BSD: Tensor) -> Tensor:
    """Causal self-attention with a GPT block's projections."""
    q, k, v = (proj(x_BSD).unflatten(-1, (H, -1)).transpose(1, 2) for proj in (block.q, block.k, block.v))
    y_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return block.o(y_BHSE.transpose(1, 2).flatten(2))


class PostNormBlock(GptBlock):
    """The norms sit on the stream itself, after each addition (Vaswani et al. 2017)."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm1(x_BSD + attend(self, x_BSD))
        return self.norm2(x_BSD + self.ffn(x_BSD))


class SandwichNormBlock(GptBlock):
    """A second norm on each branch's output, before it is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.after1, self.after2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.after1(attend(self, self.norm1(x_BSD)))
        return x_BSD + self.after2(self.ffn(self.norm2(x_BSD)))


class ParallelSandwichBlock(SandwichNormBlock):
    """Both branches read the same point, only attention's output is normalised, and so is the stream at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.Identity()

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.norm1(x_BSD)
        return self.after2(x_BSD + self.after1(attend(self, y_BSD)) + self.ffn(y_BSD))


class WideNormBlock(GptBlock):
    """q, k and the FFN's inside are normalised over their whole width, which lanes split; two KV heads."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(D, 2 * E), nn.Linear(D, 2 * E)
        self.q_norm, self.k_norm, self.inner_norm = nn.LayerNorm(D), nn.RMSNorm(2 * E), nn.LayerNorm(FFN)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.norm1(x_BSD)
        q, k, v = (
            x.unflatten(-1, (-1, E)).transpose(1, 2)
            for x in (self.q_norm(self.q(y_BSD)), self.k_norm(self.k(y_BSD)), self.v(y_BSD))
        )
        k, v = k.repeat_interleave(H // 2, dim=1), v.repeat_interleave(H // 2, dim=1)
        y_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.o(y_BHSE.transpose(1, 2).flatten(2))
        up, act, down, _ = self.ffn
        return x_BSD + down(self.inner_norm(act(up(self.norm2(x_BSD)))))


class SinkBlock(GptBlock):
    """Attention by hand with capped scores and a sink for each head (gpt-oss has the sinks, Gemma 2 the caps)."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(H))

    def attend(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (proj(x_BSD).unflatten(-1, (H, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        scores = torch.tanh(q @ k.transpose(-1, -2) * 0.4 / 2.0) * 2.0
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        columns = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        scores = torch.cat([scores, columns], dim=-1)
        shares = torch.softmax(scores - scores.amax(dim=-1, keepdim=True), dim=-1)[..., :-1]
        return self.o((shares @ v).transpose(1, 2).flatten(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attend(self.norm1(x_BSD))
        return x_BSD + self.ffn(self.norm2(x_BSD))


class EncoderLayers(nn.Module):
    """torch's own encoder between an embedding and a head."""

    def __init__(self, *, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(97, D)
        layer = nn.TransformerEncoderLayer(D, H, FFN, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(D, 97)
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BSD = self.tokens(input_ids)
        if self.batch_first:
            return self.head(self.encoder(x_BSD))
        return self.head(self.encoder(x_BSD.transpose(0, 1)).transpose(0, 1))


def decoder(block: Callable[[], nn.Module]) -> nn.Module:
    return Decoder([block() for _ in range(LAYERS)], nn.LayerNorm(D), 97, positions=True, tied=False)


_BUILDERS = (
    Builder("plain_post_norm", partial(decoder, PostNormBlock)),
    Builder("plain_sandwich_norm", partial(decoder, SandwichNormBlock)),
    Builder("plain_parallel_sandwich", partial(decoder, ParallelSandwichBlock)),
    Builder("plain_wide_norm", partial(decoder, WideNormBlock), kv_heads=2),
    Builder("plain_sinks", partial(decoder, SinkBlock)),
    Builder("torch_encoder", partial(EncoderLayers, norm_first=False, batch_first=True), no_cache="not causal"),
    Builder("torch_encoder_pre", partial(EncoderLayers, norm_first=True, batch_first=False), no_cache="not causal"),
)

NORMS: dict[str, Builder] = {builder.name: builder for builder in _BUILDERS}
