"""Models the compiler must refuse, each with a part of the reason it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.builder import Builder, random_tokens
from tests.zoo.families import modern
from tests.zoo.norms import attend
from tests.zoo.plain import FFN, LAYERS, D, Decoder, GptBlock, H


@dataclass(frozen=True)
class Rejected:
    """A model to refuse.

    Attributes:
        build: Makes it.
        reason: A part of the reason the compiler must give, in any letter case.
        inputs: The arguments of its forward, all of them token ids.
    """

    build: Builder
    reason: str
    inputs: tuple[str, ...] = ("input_ids",)

    def __call__(self) -> nn.Module:
        return self.build()

    def example_inputs(self, batch: int = 2, seq: int = 8) -> dict[str, Tensor]:
        """Seeded token ids for every input."""
        return {name: random_tokens(self.build.vocab, batch, seq, seed) for seed, name in enumerate(self.inputs)}


def _seq2seq(family: str, **config: Any) -> nn.Module:
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(family, **config))
    assert isinstance(model, nn.Module)
    return model


class SoftMoeBlock(GptBlock):
    """The FFN is four experts, mixed by a softmax over a router's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D)) for _ in range(4))
        self.ffn = nn.Identity()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + attend(self, self.norm1(x_BSD))
        y_BSD = self.norm2(x_BSD)
        share = torch.softmax(self.router(y_BSD), dim=-1)
        mixed = torch.stack([expert(y_BSD) for expert in self.experts], dim=-1)
        return x_BSD + (mixed * share.unsqueeze(-2)).sum(-1)


class FfnBlock(nn.Module):
    """No attention: every position for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.ffn(self.norm(x_BSD))


class SkipDecoder(nn.Module):
    """U-net skips: an early state of the stream is concatenated to a late one and projected back."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(97, D)
        self.down, self.up = GptBlock(), GptBlock()
        self.middle = GptBlock()
        self.fuse = nn.Linear(2 * D, D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 97, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        early = self.down(self.tokens(input_ids))
        late = self.middle(early)
        return self.head(self.norm(self.up(self.fuse(torch.cat([late, early], dim=-1)))))


def _decoder(block: Callable[[], nn.Module]) -> nn.Module:
    return Decoder([block() for _ in range(LAYERS)], nn.LayerNorm(D), 97, positions=True, tied=False)


_BART: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "max_position_embeddings": 64,
}

_SHARED_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_MODELS = (
    Rejected(Builder("soft_moe", partial(_decoder, SoftMoeBlock)), ""),
    Rejected(Builder("bart_one_input", partial(_seq2seq, "bart", **_BART)), ""),
    Rejected(Builder("no_attention", partial(_decoder, FfnBlock)), "attention"),
    Rejected(Builder("unet_skip", SkipDecoder), ""),
    Rejected(modern("recurrent_gemma", "recurrent_gemma", kv_heads=4), "mixes the columns"),
    Rejected(modern("jetmoe", "jetmoe", kv_heads=4), "no residual stream"),
    Rejected(modern("diffllama", "diffllama", kv_heads=4), "more than one attention"),
    Rejected(
        modern("afmoe", "afmoe", kv_heads=4, head_dim=8, num_dense_layers=1, **_SHARED_EXPERTS), "mixture of experts"
    ),
    Rejected(modern("mamba", "mamba"), "attention"),
)

REJECTED: dict[str, Rejected] = {model.build.name: model for model in _MODELS}
