from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.ir.forms import KRAKEN, STANDARD
from kraken_compiler.passes.pipelines import RECOGNIZE
from tests.passes.helpers import Sample, assert_close, captured, tokens
from tests.passes.models import VOCAB, Attention, Block, D, Ffn


class CrossBlock(Block):
    """A decoder's layer: self-attention, attention to what the encoder made, FFN."""

    def __init__(self) -> None:
        super().__init__(Attention(), Ffn())
        self.cross, self.norm3 = Attention(2), nn.LayerNorm(D)

    def attend(self, x_BSD: Tensor, context_BTD: Tensor) -> Tensor:
        cross = self.cross
        q, k, v = (
            proj(y).unflatten(-1, (-1, 4)).transpose(1, 2)
            for proj, y in ((cross.q, x_BSD), (cross.k, context_BTD), (cross.v, context_BTD))
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y_BHSE = nn.functional.scaled_dot_product_attention(q, k, v)
        return cross.o(y_BHSE.transpose(1, 2).flatten(2))

    def forward(self, x_BSD: Tensor, context_BTD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD))
        x_BSD = x_BSD + self.attend(self.norm3(x_BSD), context_BTD)
        return x_BSD + self.ffn(self.norm2(x_BSD))


class EncoderDecoder(nn.Module):
    """Two layers each. `reads` says which of the encoder's states a decoder's layer attends to."""

    def __init__(self, reads: str = "result") -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, D), nn.Embedding(VOCAB, D)
        self.encoder = nn.ModuleList(Block(Attention(), Ffn()) for _ in range(2))
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(2))
        self.norm, self.encoder_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB)
        self.reads = reads

    def forward(self, source: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        states = [self.source(source)]
        for block in self.encoder:
            states.append(block(states[-1]))
        result = self.encoder_norm(states[-1])
        x_BSD = self.target(target)
        for block, state in zip(self.decoder, states[1:], strict=True):
            x_BSD = block(x_BSD, state if self.reads == "depth" else result)
        logits = self.head(self.norm(x_BSD))
        if self.reads == "tail":
            logits = logits + states[1].mean(1, keepdim=True).sum(-1, keepdim=True)
        return (logits, result) if self.reads == "result" else logits


def pairs(batch: int, seq: int) -> tuple[Tensor, ...]:
    """Source and target tokens; the target is longer."""
    return (*tokens(batch, seq), *tokens(batch, seq + 3))


@cache
def sample() -> Sample:
    return captured(EncoderDecoder(), pairs)


def test_an_encoder_and_its_decoder() -> None:
    table = sample().recognized.layers
    assert table.encoder is not None
    branches = table.branches
    assert [(branch.kind, branch.layer, branch.base) for branch in branches] == [
        *((kind, layer, 0) for layer in (0, 1) for kind in ("attention", "ffn")),
        *((kind, layer, 4) for layer in (2, 3) for kind in ("attention", "attention", "ffn")),
    ]
    assert [branch.reads for branch in branches] == list(range(10))
    assert (branches[0].stream, branches[4].stream) == (table.encoder.embedding, table.embedding)
    assert [branch.kv_heads for branch in branches if branch.kind == "attention"] == [4, 4, 4, 2, 4, 2]
    assert [point for point, _ in table.joins] == list(range(11))
    assert dict(table.joins)[4] == table.encoder.final
    # The projections of the encoder's result belong to the branch that attends to it.
    nodes = {node.name: node for node in sample().recognized.graph.nodes}
    result = nodes[table.encoder.result]
    for branch in (branches[5], branches[8]):
        assert len([user for user in result.users if user.name in branch.nodes]) == 2


def test_forms_of_two_streams() -> None:
    for degree in (2, 4):
        program = sample().lanes(degree, STANDARD)
        assert_close(sample().run(program), sample().expected())
        # Both streams begin with rows that lanes look up; the decoder's are summed while the encoder runs.
        assert [reduce.is_lookup for reduce in program.plan.reduces] == [True] * 2 + [False] * 10
        assert [reduce.last for reduce in program.plan.reduces[:2]] == [0, 4]
        # What the encoder ends with is under way while the decoder begins.
        assert [bool(window.gemms) for window in program.windows] == [number in (1, 2 + 3) for number in range(12)]
    one = sample().lanes(1, KRAKEN)
    assert_close(sample().run(one), sample().expected())
    kraken = sample().lanes(2, KRAKEN)
    assert len(kraken.plan.reduces) == 2 + 2 + 4
    for read, branch in zip(kraken.plan.reads, kraken.layers.branches, strict=True):
        assert read.own >= read.peers >= branch.base
    assert all(window.gemms for window in kraken.windows if window.promised)


@pytest.mark.parametrize(
    ("reads", "text", "path"),
    [
        ("depth", "an attention lies outside the layers", "encoder.1.attention"),
        ("tail", "an attention lies outside the layers", "encoder.1.attention"),
    ],
)
def test_rejects_a_decoder_that_reads_the_encoder_in_several_places(reads: str, text: str, path: str) -> None:
    rejection = captured(EncoderDecoder(reads), pairs).rejection(*RECOGNIZE)
    assert text in rejection.reason
    assert rejection.path == path
    assert rejection.nodes


def test_rejects_one_input_for_both_streams() -> None:
    """Which of two streams an embedding begins is told by its input."""

    class Shifted(EncoderDecoder):
        def forward(self, source: Tensor) -> Tensor:
            return super().forward(source, torch.roll(source, 1, 1))[0]

    rejection = captured(Shifted(), tokens).rejection(*RECOGNIZE)
    assert "no residual stream was found" in rejection.reason or "lies outside" in rejection.reason
    assert "inputs of their own" in rejection.hint
