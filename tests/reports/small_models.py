"""A small decoder whose parts are exchanged one by one: what every test of a reported kind starts from.

Shape legend: B batch, S sequence, D stream width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.verify.compare import errors

D, HEADS, COLUMNS, VOCABULARY, POSITIONS = 64, 4, 96, 97, 256

EXAMPLE = (torch.zeros(2, 16, dtype=torch.int64),)
"""What these models are captured with."""

TOLERANCE = 1e-5
"""The relative error that float32 may make in two layers."""


class Attention(nn.Module):
    """Causal attention with one projection for queries, keys and values; subclasses override what is reported."""

    def __init__(self, width: int = D, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, H, S, E] each."""
        batch, sequence, _ = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, S, E]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def project(self, y_BSD: Tensor) -> Tensor:
        return self.out(y_BSD)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.project(self.attend(*self.split(x_BSD)).transpose(1, 2).flatten(2))


class FFN(nn.Module):
    """Up, GELU, down."""

    def __init__(self, width: int = D, columns: int = COLUMNS) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, columns), nn.Linear(columns, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)))


class LM(nn.Module):
    """Pre-norm decoder of token ids [B, S] to logits [B, S, vocabulary], with seeded weights that all count."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = Attention,
        ffn: Callable[[], nn.Module] = FFN,
        layers: int = 2,
        width: int = D,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(POSITIONS, width)
            self.attention = nn.ModuleList(attention() for _ in range(layers))
            self.ffn = nn.ModuleList(ffn() for _ in range(layers))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
            self.head = nn.Linear(width, VOCABULARY)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.2)
        self.eval()

    def embed(self, ids: Tensor) -> Tensor:
        """[B, S, D]."""
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.embed(ids)
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            x_BSD = x_BSD + attention(self.norms[2 * layer](x_BSD))
            x_BSD = x_BSD + ffn(self.norms[2 * layer + 1](x_BSD))
        return self.head(x_BSD)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(output: object) -> Tensor:
    """A model's logits, whether it returns them alone or in a record."""
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


def relative_error(have: nn.Module, want: nn.Module, *shape: int) -> float:
    """Largest difference of two models' logits on random tokens, over the largest logit."""
    ids = tokens(*shape)
    with torch.no_grad():
        return errors(logits(have(ids)), logits(want(ids)))[1]


def greedy(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """The next tokens by the model's own forward on everything so far, one sequence, the most likely each time."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            found.append(int(logits(model(torch.tensor([[*prompt, *found]])))[0, -1].argmax()))
    return found


def pickled(build: Callable[[], nn.Module], directory: Path) -> Path:
    """The file of a model of fixed weights that was pickled."""
    path = directory / "model.pt"
    torch.manual_seed(0)
    torch.save(build().eval(), path)
    return path
