"""Only lookups that take other rows for other positions end with their table: token types bound no sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from kraken_compiler.capture import capture
from kraken_compiler.passes.sample_inputs import NO_LIMIT, position_limit
from tests.reports import small_models
from tests.reports.cached_decoding import check_decode, lowered
from tests.reports.small_models import POSITIONS, D

pytestmark = pytest.mark.slow

NAMED = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}


class Typed(small_models.LM):
    """Learned positions and what `typed` adds of an embedding of three types."""

    def __init__(self, typed: Callable[[Typed, Tensor], Tensor]) -> None:
        super().__init__(layers=1)
        self.types = nn.Embedding(3, D)
        nn.init.normal_(self.types.weight)
        self.typed = typed
        segments = torch.zeros(1, 40, dtype=torch.int64)
        self.register_buffer("segments", segments, persistent=False)
        self.register_buffer("saved_segments", segments.clone())
        self.register_buffer("places", torch.arange(40)[None], persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) + self.typed(self, ids)


KINDS: dict[str, tuple[Callable[[Typed, Tensor], Tensor], int]] = {
    "zeros": (lambda lm, ids: lm.types(torch.zeros_like(ids)), POSITIONS),
    "ones": (lambda lm, ids: lm.types(torch.ones(*ids.shape, dtype=torch.int64)), POSITIONS),
    "another type for each": (lambda lm, ids: lm.types(torch.full_like(ids, 2)) - lm.types.weight[1], POSITIONS),
    "one row for all": (lambda lm, ids: lm.types(torch.tensor([1])).expand(*ids.shape, D), POSITIONS),
    "alternating": (lambda lm, ids: lm.types(torch.arange(ids.shape[1]) % 3), POSITIONS),
    "up to the last": (lambda lm, ids: lm.types(torch.arange(ids.shape[1]).clamp_max(2)), POSITIONS),
    "a buffer that is cut": (lambda lm, ids: lm.types(lm.segments[:, : ids.shape[1]]), 40),
    "a saved buffer that is cut": (
        lambda lm, ids: lm.types(lm.saved_segments[:, : ids.shape[1]].expand(*ids.shape)),
        40,
    ),
    "positions in a buffer": (lambda lm, ids: lm.positions(lm.places[:, : ids.shape[1]]) * 0.5, 40),
    "the last rows first": (lambda lm, ids: lm.positions.weight[torch.arange(ids.shape[1]) - 5], POSITIONS),
    "rows of a cut table": (lambda lm, ids: lm.positions.weight[:40][torch.arange(ids.shape[1])], 40),
    "the last rows of a cut table": (lambda lm, ids: lm.positions.weight[:40][torch.arange(ids.shape[1]) - 30], 70),
    "every second position": (lambda lm, ids: lm.positions(torch.arange(ids.shape[1]) * 2) * 0.5, POSITIONS // 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_is_that_of_the_positions(kind: str) -> None:
    typed, limit = KINDS[kind]
    model = Typed(typed)
    program, read = lowered(model)
    assert program.cached is not None, program.no_cache
    assert program.cached.plan.limit == limit
    check_decode(model, program, read)


def bert_decoder(kind: str) -> nn.Module:
    sizes = {
        "vocab_size": 97,
        "hidden_size": D,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(**sizes, max_position_embeddings=48, is_decoder=True)
        return transformers.BertLMHeadModel(config).eval()
    config = transformers.RobertaConfig(**sizes, max_position_embeddings=50, is_decoder=True, pad_token_id=1)
    return transformers.RobertaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_bert_as_a_decoder(kind: str) -> None:
    """Both keep 48 positions; RoBERTa counts tokens that are no padding, which only recomputation can."""
    model = bert_decoder(kind)
    program = capture(model, example_inputs=NAMED).program
    assert position_limit(program) == 48
    lanes, read = lowered(model, example=NAMED)
    if kind == "bert":
        assert lanes.cached is not None, lanes.no_cache
        assert lanes.cached.plan.limit == 48
        check_decode(model, lanes, read)


def test_buckets_of_distances_bound_nothing() -> None:
    config = transformers.T5Config(
        vocab_size=97, d_model=D, d_kv=16, d_ff=96, num_layers=1, num_heads=4, relative_attention_num_buckets=8
    )
    model = transformers.T5EncoderModel(config).eval()
    assert position_limit(capture(model, example_inputs=NAMED).program) == NO_LIMIT
