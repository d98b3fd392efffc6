"""Writes `model.pt`: a small standard Transformer in plain torch, as a torch.export archive.

    python examples/write_model_pt.py
    kraken-compile model.pt --degree 4

Batch and sequence length stay dynamic, so the compiled programs take any. Shape legend: B batch, S sequence, D width.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, POSITIONS, WIDTH, HEADS, LAYERS = 1000, 512, 256, 8, 6


class Layer(nn.Module):
    """Pre-norm: attention, then a feed-forward network, each adding to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x_BSD: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, dim=-1))
        return self.project(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attend(self.attention_norm(x_BSD))
        return x_BSD + self.contract(F.gelu(self.expand(self.ffn_norm(x_BSD))))


class Transformer(nn.Module):
    """A decoder: token ids, int64 [B, S], to logits, float32 [B, S, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BSD = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.head(self.norm(x_BSD))


def main(path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randint(VOCABULARY, (2, 16))
    any_size = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=POSITIONS)}}
    program = torch.export.export(Transformer().eval(), (example,), dynamic_shapes=any_size)
    # Through a file object, because given a name torch.export.save insists on the suffix .pt2.
    with path.open("wb") as file:
        torch.export.save(program, file)
    print(f"wrote {path}: {LAYERS} layers, {HEADS} heads, width {WIDTH}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "model.pt"))
