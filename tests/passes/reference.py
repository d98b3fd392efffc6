"""The read equation taken literally: a tiny GPT whose lanes are Python loops. Shares no code with the compiler.

    read_k^i = G[k-p] + (O^i[k-o] - O^i[k-p])

Weights are cut by hand: heads and FFN columns in equal blocks, output biases in N-ths, the vocabulary in rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.ir.forms import Form
from tests.passes.models import VOCAB, E, Gpt


class UnrolledGpt:
    """`model` in N lanes.

    Attributes:
        parts: What each lane holds, [source name][lane]; one tensor for all lanes where they hold the same. Leaves.
    """

    def __init__(self, model: Gpt, degree: int, forms: Sequence[Form], parallel: bool = False) -> None:
        self.degree, self.forms, self.parallel = degree, forms, parallel
        self.parts = {name: self._cut(name, value.detach()) for name, value in model.named_parameters()}

    def _cut(self, name: str, value: Tensor) -> list[Tensor]:
        by_rows = ("q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias", "up.weight", "up.bias")
        if name.endswith(by_rows):
            pieces = list(value.chunk(self.degree, dim=0))
        elif name.endswith(("o.weight", "down.weight")):
            pieces = list(value.chunk(self.degree, dim=1))
        elif name.endswith(("o.bias", "down.bias")):
            pieces = [value / self.degree]
        elif name.startswith(("head.", "tokens.")):
            pieces = list(value.split(-(-VOCAB // self.degree)))
        else:
            pieces = [value]
        leaves = [piece.clone().requires_grad_() for piece in pieces]
        return leaves if len(leaves) == self.degree else leaves * self.degree

    def __call__(self, ids: Tensor) -> Tensor:
        embedding = F.embedding(ids, torch.cat(self.parts["tokens.weight"]))
        outputs: list[list[Tensor]] = []

        def own(lane: int, point: int) -> Tensor:
            """O^i[m]: what the lane alone contributed."""
            return sum((branch[lane] for branch in outputs[:point]), torch.zeros_like(embedding))

        def all_lanes(point: int) -> Tensor:
            """G[m]: the embedding and what all lanes contributed."""
            return embedding + sum((own(lane, point) for lane in range(self.degree)), torch.zeros_like(embedding))

        for layer, form in enumerate(self.forms):
            for position, (kind, lag) in enumerate((("attention", form.attention), ("ffn", form.ffn))):
                branch = 2 * layer + position + 1
                # In a parallel layer no branch reads further than the layer's beginning.
                furthest = 2 * layer if self.parallel else branch - 1
                near, far = (max(0, min(branch - late, furthest)) for late in (lag.own, lag.peers))
                reads = [all_lanes(far) + own(lane, near) - own(lane, far) for lane in range(self.degree)]
                run = self._attention if kind == "attention" else self._ffn
                outputs.append([run(layer, lane, read) for lane, read in enumerate(reads)])
        return self._head(all_lanes(len(outputs)))

    def _part(self, layer: int, name: str, lane: int) -> Tensor:
        return self.parts[f"blocks.{layer}.{name}"][lane]

    def _linear(self, layer: int, name: str, lane: int, x: Tensor) -> Tensor:
        return x @ self._part(layer, f"{name}.weight", lane).t() + self._part(layer, f"{name}.bias", lane)

    def _norm(self, layer: int, name: str, lane: int, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self._part(layer, f"{name}.weight", lane), self._part(layer, f"{name}.bias", lane)
        )

    def _attention(self, layer: int, lane: int, x: Tensor) -> Tensor:
        x = self._norm(layer, "norm1", lane, x)
        q, k, v = (
            self._linear(layer, f"attention.{name}", lane, x).unflatten(-1, (-1, E)).transpose(1, 2) for name in "qkv"
        )
        scores = q @ k.mT / E**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self._linear(layer, "attention.o", lane, y.transpose(1, 2).flatten(2))

    def _ffn(self, layer: int, lane: int, x: Tensor) -> Tensor:
        x = self._norm(layer, "norm2", lane, x)
        return self._linear(layer, "ffn.down", lane, F.gelu(self._linear(layer, "ffn.up", lane, x)))

    def _head(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], self.parts["norm.weight"][0], self.parts["norm.bias"][0])
        weights, biases = self.parts["head.weight"], self.parts["head.bias"]
        if weights[0].shape[0] == VOCAB:
            return F.linear(x, weights[0], biases[0])
        return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)
