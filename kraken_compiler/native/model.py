"""`KrakenLM`: the architecture of the Kraken paper (arXiv 2408.07802, section 3), all lanes in one process.

Every layer has N lanes, each with a narrow stream of its own, an attention and an FFN. The lanes meet once a layer: the
streams that a layer leaves are summed while the next layer's attention runs, which reads its own stream alone, and the
sum enters that layer's FFN.

    layer 1:      a_i = x + Attn_i(LN1_i(x))          x_i = a_i + FFN_i(LN2_i(a_i))
    layers 2..L:  m_i = Attn_i(LN1_i(x_i))
                  S   = sum over lanes of x_j          begun when the layer before ended
                  a_i = x_i + m_i                      x_i <- a_i + FFN_i(LN2_i(S + m_i))
    end:          concat(x_1 .. x_N) W_concat, a norm, and the embedding as the head

`KrakenLane` is what one device holds. On N devices the sums over lanes are all-reduces.

Legend: B batch, T tokens, C width of a lane's stream, D width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.native.config import LAYER_NORM, LEARNED, ROTARY, SWIGLU, KrakenConfig

_DEVIATION = 0.02
"""Standard deviation of initial weights, GPT-2's; the last projections of branches have less, for there are many."""

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of every position's angles, [T, D] each."""


class KrakenAttention(nn.Module):
    """Causal attention of a lane to its own stream."""

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        self.config = config
        keys, bias = config.keys * config.head, config.has_biases
        self.query = nn.Linear(config.width, config.width, bias=bias)
        self.key = nn.Linear(config.width, keys, bias=bias)
        self.value = nn.Linear(config.width, keys, bias=bias)
        self.out = nn.Linear(config.width, config.width, bias=bias)

    def forward(self, x_BTC: Tensor, rotation: Rotation | None) -> Tensor:
        q, k, v = (
            project(x_BTC).unflatten(-1, (-1, self.config.head)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if rotation is not None:
            q, k = (_rotated(x, rotation) for x in (q, k))
        grouped = self.config.keys < self.config.heads
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(-2))
        return out


class KrakenFFN(nn.Module):
    """The FFN of a lane."""

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        bias = config.has_biases
        self.gate = nn.Linear(config.width, config.inside, bias=bias) if config.ffn == SWIGLU else None
        self.up = nn.Linear(config.width, config.inside, bias=bias)
        self.down = nn.Linear(config.inside, config.width, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        up = self.up(x_BTC)
        inside = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x_BTC)) * up
        down: Tensor = self.down(inside)
        return down


class KrakenLayer(nn.Module):
    """A layer of a lane."""

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norm_of(config), norm_of(config)
        self.attention = KrakenAttention(config)
        self.ffn = KrakenFFN(config)

    def attend(self, x_BTC: Tensor, rotation: Rotation | None) -> Tensor:
        """What the attention adds to the stream."""
        attended: Tensor = self.attention(self.attention_norm(x_BTC), rotation)
        return attended

    def think(self, read_BTC: Tensor) -> Tensor:
        """What the FFN adds to the stream, from what it reads."""
        added: Tensor = self.ffn(self.ffn_norm(read_BTC))
        return added


class KrakenLane(nn.Module):
    """One lane: its layers, and its rows of W_concat."""

    def __init__(self, config: KrakenConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KrakenLayer(config) for _ in range(config.layers))
        self.join = nn.Linear(config.width, config.width, bias=False)

    def layer(self, number: int) -> KrakenLayer:
        """A layer by its number."""
        found = self.layers[number]
        assert isinstance(found, KrakenLayer)
        return found

    def joined(self, x_BTC: Tensor) -> Tensor:
        """The lane's share of the product of all streams with W_concat."""
        product: Tensor = self.join(x_BTC)
        return product


class KrakenLM(nn.Module):
    """A Kraken language model.

    Attributes:
        config: Its sizes and kinds.
    """

    def __init__(self, config: KrakenConfig) -> None:
        """Build the model with initial weights."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.positions == LEARNED else None
        self.lanes = nn.ModuleList(KrakenLane(config) for _ in range(config.degree))
        self.norm = norm_of(config)
        self.apply(_initialise)
        with torch.no_grad():  # Scaled and not drawn anew: a seed gives the same other weights at every deviation.
            self.embedding.weight.mul_(config.embedding_deviation / _DEVIATION)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "ffn.down.weight")):
                nn.init.normal_(parameter, std=_DEVIATION / math.sqrt(2 * config.layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of token ids int64 [B, T]."""
        x_BTC, rotation = self.embedded(input_ids), self.rotation(input_ids)
        lanes = [self.lane(number) for number in range(self.config.degree)]
        streams = [x_BTC] * len(lanes)
        total: Tensor | None = None
        for number in range(self.config.layers):
            layers = [lane.layer(number) for lane in lanes]
            attended = [layer.attend(x, rotation) for layer, x in zip(layers, streams)]
            own = [x + m for x, m in zip(streams, attended)]
            # The first layer's streams are all the embedding: there is nothing to add up.
            reads = own if total is None else [total + m for m in attended]
            streams = [a + layer.think(read) for layer, a, read in zip(layers, own, reads)]
            total = _sum(streams)
        return self.logits(_sum([lane.joined(x) for lane, x in zip(lanes, streams)]))

    def lane(self, number: int) -> KrakenLane:
        """A lane by its number."""
        found = self.lanes[number]
        assert isinstance(found, KrakenLane)
        return found

    def loss(self, input_ids: Tensor) -> Tensor:
        """Mean cross-entropy of every next token, in nats."""
        logits = self(input_ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Where all streams begin, [B, T, C]."""
        x_BTC: Tensor = self.embedding(input_ids)
        if self.positions is None:
            return x_BTC
        places: Tensor = self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        return x_BTC + places

    def rotation(self, input_ids: Tensor) -> Rotation | None:
        """The angles of rotary positions; None if positions are learned."""
        config = self.config
        if config.positions != ROTARY:
            return None
        pairs = torch.arange(0, config.head, 2, device=input_ids.device, dtype=torch.float32)
        places = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        angles = places[:, None] * config.rotary_base ** (-pairs / config.head)
        angles = torch.cat((angles, angles), -1)
        dtype = self.embedding.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def logits(self, joined_BTC: Tensor) -> Tensor:
        """The head, which is the embedding, on what the lanes have joined."""
        return F.linear(self.norm(joined_BTC), self.embedding.weight)


def norm_of(config: KrakenConfig) -> nn.Module:
    """A norm of the kind that a model has."""
    kind = nn.LayerNorm if config.norm == LAYER_NORM else nn.RMSNorm
    return kind(config.width, eps=config.norm_epsilon)


def _sum(streams: list[Tensor]) -> Tensor:
    return torch.stack(streams).sum(0)


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    cosine, sine = rotation
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat((-right, left), -1) * sine


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_DEVIATION)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
