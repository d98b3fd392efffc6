"""What every zoo model is made with: a named builder, seeded weights of a useful size, seeded tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Builder:
    """Makes one zoo model; call it.

    Attributes:
        name: Name in the zoo.
        make: Builds the model with whatever weights its library gives it.
        vocab: Vocabulary size.
        heads: Query heads.
        kv_heads: Key and value heads.
        degrees: The degrees above 1 that divide heads and FFN columns; where one exceeds `kv_heads`, KV heads are
            replicated.
        layers: Number of layers.
        max_positions: Longest sequence the model takes.
        no_cache: A part of the reason why there is no KV cache, "" if there is one. Encoders have none.
    """

    name: str
    make: Callable[[], nn.Module]
    vocab: int = 97
    heads: int = 8
    kv_heads: int = 8
    degrees: tuple[int, ...] = (2, 4, 8)
    layers: int = 3
    max_positions: int = 64
    no_cache: str = ""

    def __call__(self) -> nn.Module:
        """The model in fp32 and eval mode, with the same weights in every process; it carries `.vocab`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().float().eval()
        # crc32, because Python's own string hash differs between processes.
        randomize(model, seed=zlib.crc32(self.name.encode()))
        model.vocab = self.vocab
        return model


def randomize(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter with seeded normals.

    Libraries start biases at zero, gains at one and weights at a standard deviation of 0.02; a compiler that loses a
    bias, a gain or a whole branch would pass on such a model. Here attention is far from uniform and every term counts.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif id(parameter) in norms or parameter.dim() == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


def random_tokens(vocab: int, batch: int, seq: int, seed: int = 0) -> Tensor:
    """Seeded token ids, int64 [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, seq), generator=generator)


def token_batch(model: nn.Module, batch: int, seq: int, seed: int = 0) -> Tensor:
    """Seeded token ids for a zoo model, int64 [batch, seq]."""
    vocab = model.vocab
    assert isinstance(vocab, int), "not a zoo model"
    return random_tokens(vocab, batch, seq, seed)


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The logits of a forward pass without gradients, whatever the model wraps them in."""
    with torch.no_grad():
        output = model(input_ids)
    if isinstance(output, Tensor):
        return output
    logits = output[0] if isinstance(output, tuple) else output.logits
    assert isinstance(logits, Tensor)
    return logits
