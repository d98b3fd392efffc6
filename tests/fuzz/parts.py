"""The parts of a random decoder.

Shape legend: B batch, S sequence, D stream width, H query heads, K key/value heads, E head width, F FFN columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.fuzz.recipe import Recipe

LIMIT = 96
"""Rows of learned and precomputed position tables."""

WINDOW = 5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda x: F.relu(x).square(),
}


class RmsNormByHand(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "layer_norm_plain": lambda size: nn.LayerNorm(size, elementwise_affine=False),
    "rms_norm": lambda size: nn.RMSNorm(size, eps=1e-6),
    "rms_norm_by_hand": RmsNormByHand,
    "none": lambda size: nn.Identity(),
}


class ComputedLinear(nn.Module):
    """A linear layer whose weight is computed in every call, in one of several ways."""

    def __init__(self, kind: str, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(
            torch.empty(2, outputs, inputs) if kind == "stacked" else torch.empty(outputs, inputs)
        )
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        if kind == "masked":
            self.register_buffer("mask", (torch.arange(outputs)[:, None] + torch.arange(inputs)) % 3 > 0)
        if kind == "low_rank":
            self.down, self.up = nn.Parameter(torch.empty(2, inputs)), nn.Parameter(torch.empty(outputs, 2))

    def computed(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "scaled":
            return 0.5 * self.weight
        if self.kind == "cast":
            return self.weight.to(torch.float64).to(dtype)
        if self.kind == "masked":
            return self.weight * self.mask
        if self.kind == "low_rank":
            return self.weight + self.up @ self.down
        return self.weight[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.computed(x.dtype), self.bias)


def linear(recipe: Recipe, place: str, inputs: int, outputs: int) -> nn.Module:
    """A linear layer; its weight is computed in the call if the recipe says so of this place."""
    kind = recipe.weights if recipe.weight_place in (place, "all") else "plain"
    if kind == "plain":
        return nn.Linear(inputs, outputs, bias=recipe.biases)
    if kind == "weight_norm":
        return weight_norm(nn.Linear(inputs, outputs, bias=recipe.biases))
    return ComputedLinear(kind, inputs, outputs, recipe.biases)


def angles(recipe: Recipe, length: int, size: int) -> Tensor:
    """[S, size / 2]."""
    return torch.arange(length).float()[:, None] / 50.0 ** (torch.arange(size // 2) / (size // 2))


def rotated(recipe: Recipe, x_BHSE: Tensor) -> Tensor:
    """Rotary positions, in the recipe's spelling."""
    kind, (_, _, length, size) = recipe.positions, x_BHSE.shape
    if kind == "rotary_partial":
        turned, rest = x_BHSE[..., : size // 2], x_BHSE[..., size // 2 :]
        return torch.cat([_by_halves(turned, angles(recipe, length, size // 2)), rest], -1)
    turns = angles(recipe, length, size)
    if kind == "rotary_half":
        return _by_halves(x_BHSE, turns)
    if kind == "rotary_pairs":
        even, odd = x_BHSE[..., ::2], x_BHSE[..., 1::2]
        cos, sin = turns.cos().to(x_BHSE.dtype), turns.sin().to(x_BHSE.dtype)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    if kind == "rotary_complex":
        turn = torch.polar(torch.ones_like(turns), turns)
        pairs = torch.view_as_complex(x_BHSE.float().reshape(*x_BHSE.shape[:-1], size // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x_BHSE.dtype)
    return x_BHSE


def _by_halves(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (turns.cos(), turns.sin()))
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def mask_of(recipe: Recipe, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, [1 or H, S, S]."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance >= 0
    if recipe.attention == "window":
        seen = seen & (distance < WINDOW)
    mask = torch.zeros(length, length, dtype=dtype).masked_fill(~seen, float("-inf"))[None]
    if recipe.positions == "alibi":
        slopes = 2.0 ** -(torch.arange(1, recipe.heads + 1, dtype=dtype))
        mask = mask - slopes[:, None, None] * distance.to(dtype)
    return mask


def attended(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, E], keys and values of K heads."""
    length = q.shape[2]
    if recipe.attention == "sdpa" and recipe.positions != "alibi":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    mask = mask_of(recipe, length, q.dtype)
    if recipe.attention in ("sdpa", "sdpa_masked", "window"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scale = 1 / math.sqrt(q.shape[-1])
    if recipe.attention == "einsum":
        scores = torch.einsum("bhse,bhte->bhst", q, k) * scale
        return torch.einsum("bhst,bhte->bhse", (scores + mask).softmax(-1), v)
    scores = (q @ k.transpose(-1, -2)) * scale
    if recipe.attention == "softcap":
        scores = 5.0 * torch.tanh(scores / 5.0)
    return (scores + mask).softmax(-1) @ v
