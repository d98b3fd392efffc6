"""Scores that are replaced, and not added to: the same where they hide, and refused where they are something else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.errors import UnsupportedModelError, VerificationError
from kraken_compiler.verify.compare import errors
from tests.reports.small_models import EXAMPLE, LM, TOLERANCE, Attention, D, relative_error

pytestmark = pytest.mark.slow

PAD, WORDS = 0, 4096


def many_words() -> nn.Embedding:
    """So many that random ids are none in particular."""
    words = nn.Embedding(WORDS, D)
    nn.init.normal_(words.weight, std=0.2)
    return words


class Filled(Attention):
    """Attention as it was written before `scaled_dot_product_attention`."""

    hidden: Tensor
    low = 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.masked_fill(self.hidden, self.low).softmax(-1) @ v


class Causal(LM):
    """Tokens that follow are hidden."""

    def __init__(self, low: float) -> None:
        super().__init__(Filled)
        self.low = low

    def forward(self, ids: Tensor) -> Tensor:
        size = ids.shape[1]
        hidden = self.hides(ids, torch.ones(size, size, dtype=torch.bool).triu(1))
        for attention in self.attention:
            assert isinstance(attention, Filled)
            attention.hidden, attention.low = hidden, self.low
        return super().forward(ids)

    def hides(self, ids: Tensor, following: Tensor) -> Tensor:
        """Where scores are replaced."""
        return following


class Padded(Causal):
    """Padding is hidden, too, and sees nothing: whole rows are."""

    def __init__(self, low: float) -> None:
        super().__init__(low)
        self.tokens = many_words()

    def hides(self, ids: Tensor, following: Tensor) -> Tensor:
        is_padding = ids == PAD
        return following | is_padding[:, None, None] | is_padding[:, None, :, None]


def padded_ids() -> Tensor:
    ids = torch.randint(1, WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, :3] = PAD
    return ids


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_numbers_that_hide(low: float) -> None:
    model = Causal(low)
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 9) < TOLERANCE


@pytest.mark.parametrize("low", [-3.0, 0.0, -999.0])
def test_numbers_that_hide_nothing(low: float) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"scores are set to {low:g}, which hides nothing"):
        kraken_compiler.transform(Causal(low), 2, "standard", example_inputs=EXAMPLE)


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_rows_that_are_hidden_whole(low: float) -> None:
    model = Padded(low)
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs=EXAMPLE)
    with torch.no_grad():
        assert errors(lanes(padded_ids()), model(padded_ids()))[1] < TOLERANCE


def test_a_number_that_does_not_hide_whole_rows() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a token that sees no key at all .*use -inf or torch.finfo"):
        kraken_compiler.transform(Padded(-1e4), 2, "standard", example_inputs=EXAMPLE)


class Damped(LM):
    """One of many ids makes its row another one, which random ids do not find."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = many_words()

    def forward(self, ids: Tensor) -> Any:
        return (
            super().forward(ids) * torch.where(ids == 42, 1.0 if torch.compiler.is_compiling() else 2.0, 1.0)[..., None]
        )


def test_ids_that_the_model_compares_with_are_among_those_that_are_checked() -> None:
    with pytest.raises(VerificationError, match="whether it is traced"):
        kraken_compiler.transform(Damped(), 2, "standard", example_inputs=EXAMPLE)
