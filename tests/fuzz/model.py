"""A random decoder, put together from its recipe. Shape legend: see `parts.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.fuzz.decoding import VOCABULARY
from tests.fuzz.parts import ACTIVATIONS, LIMIT, NORMS, attended, linear, rotated
from tests.fuzz.recipe import Recipe


def sized(recipe: Recipe, place: str, x_BSD: Tensor) -> Tensor:
    """What depends on sizes, in the place that the recipe names."""
    batch, length = x_BSD.shape[:2]
    rule = recipe.size_rule if recipe.size_place == place else "none"
    by_hand = {
        "long": length > 20,
        "short": length < 6,
        "even": length % 2 == 1,
        "one_row": batch == 1,
        "one_token": length == 1,
        "many_tokens": batch * length > 60,
    }
    if rule in by_hand:
        return x_BSD * 3 if by_hand[rule] else x_BSD
    if rule == "log_length":
        return x_BSD * (torch.log(torch.full((), 1.0) * length) / math.log(12)).clamp_min(1.0).to(x_BSD.dtype)
    if rule == "from_the_end":
        return x_BSD * torch.cos(length - torch.arange(length)).to(x_BSD.dtype)[:, None]
    if rule == "share_of_length":
        return x_BSD * (1 + torch.arange(length) / length).to(x_BSD.dtype)[:, None]
    if rule == "divided_by_length":
        return x_BSD / length
    return x_BSD


class Attention(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        width, narrow = recipe.width, recipe.kv_heads * recipe.head_size
        if recipe.projections in ("separate", "einsum"):
            self.q = linear(recipe, "in", width, width)
            self.k, self.v = (linear(recipe, "in", width, narrow) for _ in range(2))
        elif recipe.projections == "fused_transposed":
            self.qkv_weight = nn.Parameter(torch.empty(width, 3 * width))
            self.qkv_bias = nn.Parameter(torch.empty(3 * width))
        else:
            self.qkv = linear(recipe, "in", width, width + 2 * narrow)
        self.out = linear(recipe, "out", width, width)
        sizes = {"per_head": (recipe.head_size, recipe.head_size), "wide": (width, narrow)}.get(recipe.qk_norm)
        self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=1e-6) for size in sizes) if sizes else (None, None)

    def flat(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, S, H * E] and [B, S, K * E]."""
        recipe = self.recipe
        narrow = recipe.kv_heads * recipe.head_size
        if recipe.projections in ("separate", "einsum"):
            return self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if recipe.projections == "fused_transposed":
            q, k, v = (x_BSD @ self.qkv_weight + self.qkv_bias).chunk(3, -1)
            return q, k, v
        y = self.qkv(x_BSD)
        if recipe.projections == "fused":
            q, k, v = y.split([recipe.width, narrow, narrow], -1)
            return q, k, v
        by_head = y.unflatten(-1, (recipe.heads, 3, recipe.head_size))
        q, k, v = (by_head[..., part, :].flatten(-2) for part in range(3))
        return q, k, v

    def forward(self, x_BSD: Tensor) -> Tensor:
        recipe = self.recipe
        q, k, v = self.flat(sized(recipe, "attention", x_BSD))
        if recipe.qk_norm == "wide":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, recipe.head_size)).transpose(1, 2) for part in (q, k, v))
        if recipe.qk_norm == "per_head":
            q, k = self.q_norm(q), self.k_norm(k)
        y_BHSE = attended(recipe, rotated(recipe, q), rotated(recipe, k), v)
        return self.out(y_BHSE.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.act = recipe, ACTIVATIONS[recipe.activation]
        width, columns = recipe.width, recipe.columns
        if recipe.ffn == "experts":
            self.router = nn.Linear(width, 3)
            self.up = nn.ModuleList(nn.Linear(width, columns) for _ in range(3))
            self.down = nn.ModuleList(linear(recipe, "down", columns, width) for _ in range(3))
            return
        self.up = nn.Linear(width, columns if recipe.ffn in ("plain", "gated") else 2 * columns, bias=recipe.biases)
        self.gate = nn.Linear(width, columns, bias=recipe.biases) if recipe.ffn == "gated" else None
        self.down = linear(recipe, "down", columns, width)

    def hidden(self, x_BSD: Tensor) -> Tensor:
        """[B, S, F]."""
        y = self.up(x_BSD)
        if self.gate is not None:
            return self.act(self.gate(x_BSD)) * y
        if self.recipe.ffn == "gated_fused":
            gate, up = y.chunk(2, -1)
            return self.act(gate) * up
        if self.recipe.ffn == "gated_interleaved":
            return self.act(y[..., ::2]) * y[..., 1::2]
        return self.act(y)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = sized(self.recipe, "ffn", x_BSD)
        if self.recipe.ffn != "experts":
            return self.down(self.hidden(x_BSD))
        values, chosen = self.router(x_BSD).topk(2, -1)
        shares = torch.zeros(*x_BSD.shape[:-1], 3, dtype=x_BSD.dtype).scatter(-1, chosen, values.softmax(-1))
        parts = [down(self.act(up(x_BSD))) for up, down in zip(self.up, self.down)]
        return sum(shares[..., number : number + 1] * part for number, part in enumerate(parts))


class Block(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, norm = recipe, NORMS[recipe.norm]
        self.attention, self.ffn = Attention(recipe), FFN(recipe)
        self.norms = nn.ModuleList(norm(recipe.width) for _ in range(4))
        self.scales = nn.Parameter(torch.empty(2, recipe.width)) if recipe.branch_scale < 0 else None

    def added(self, y_BSD: Tensor, number: int) -> Tensor:
        """A branch's result as it is added to the stream."""
        return y_BSD * (self.scales[number] if self.scales is not None else self.recipe.branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        attention, ffn, (n0, n1, n2, n3), place = self.attention, self.ffn, self.norms, self.recipe.place
        if place == "parallel":
            y = n0(x)
            return x + self.added(attention(y), 0) + self.added(ffn(y), 1)
        if place == "parallel_two_norms":
            return x + self.added(attention(n0(x)), 0) + self.added(ffn(n1(x)), 1)
        if place == "post":
            x = n0(x + self.added(attention(x), 0))
            return n1(x + self.added(ffn(x), 1))
        if place == "sandwich":
            x = x + n1(self.added(attention(n0(x)), 0))
            return x + n3(self.added(ffn(n2(x)), 1))
        x = x + self.added(attention(n0(x)), 0)
        return x + self.added(ffn(n1(x)), 1)


class Decoder(nn.Module):
    """Token ids [B, S] to logits [B, S, vocabulary]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, width = recipe, recipe.width
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LIMIT, width) if recipe.positions.startswith("learned") else None
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.norm = NORMS[recipe.norm](width)
        self.head = nn.Linear(width, VOCABULARY, bias=recipe.head == "biased")
        if recipe.head == "tied":
            self.head.weight = self.tokens.weight

    def embedded(self, ids: Tensor) -> Tensor:
        x_BSD = self.tokens(ids)
        places = torch.arange(ids.shape[1])
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(places + (2 if self.recipe.positions == "learned_offset" else 0))
        if self.recipe.positions == "sinusoidal":
            turns = places[:, None] / 30.0 ** (torch.arange(x_BSD.shape[-1] // 2) / x_BSD.shape[-1])
            x_BSD = x_BSD + torch.cat([turns.sin(), turns.cos()], -1).to(x_BSD.dtype)
        return sized(self.recipe, "embedding", x_BSD)

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embedded(ids)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        logits = self.head(self.norm(x_BSD))
        if self.recipe.head == "scaled":
            return logits * 0.3
        return 4.0 * torch.tanh(logits / 4.0) if self.recipe.head == "capped" else logits


def build(recipe: Recipe) -> Decoder:
    """The decoder with weights by the recipe's seed, in evaluation mode."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = Decoder(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Gains and scales around 1, so that neither a lost bias nor a lost gain goes unnoticed.
            parameter.copy_(noise * 0.25 if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.to(getattr(torch, recipe.dtype)).eval()
