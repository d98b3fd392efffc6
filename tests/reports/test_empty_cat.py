"""`torch.cat` with an empty one-dimensional tensor, the cache that holds nothing yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kraken_compiler
from tests.reports.small_models import EXAMPLE, FFN, LM, TOLERANCE, Attention, relative_error

pytestmark = pytest.mark.slow


class Reported(LM):
    def embed(self, ids: Tensor) -> Tensor:
        return torch.cat([torch.tensor([]), super().embed(ids)], 1)


class EmptyCaches(Attention):
    """Keys and values are appended to nothing, along the sequence from either end."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat([torch.zeros(0), k], dim=2)
        v = torch.cat([torch.empty(0), v, torch.tensor([])], dim=-2)
        return super().attend(q, k, v)


class EmptyColumns(FFN):
    """Among others, along the columns, after one that is empty in the modern way."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.up(x_BSD).relu()
        return self.down(torch.cat([torch.zeros(0), hidden, hidden[..., :0]], -1))


class NothingAtAll(LM):
    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) + torch.cat([torch.tensor([]), torch.zeros(0)]).sum()


class WholeNumbers(LM):
    """Nothing of floats makes floats of token ids."""

    def embed(self, ids: Tensor) -> Tensor:
        mixed = torch.cat([torch.zeros(0), ids], 1)
        return super().embed(ids) * (1 + mixed.unsqueeze(-1) / 97)


class WiderType(LM):
    """Nothing of float64 makes float64 of float32."""

    def embed(self, ids: Tensor) -> Tensor:
        x_BSD = torch.cat([torch.zeros(0, dtype=torch.float64), super().embed(ids)], 1)
        return (x_BSD + 1e-9).float() if x_BSD.dtype == torch.float64 else x_BSD * 0


MODELS = {
    "reported": Reported,
    "caches": lambda: LM(EmptyCaches),
    "columns": lambda: LM(ffn=EmptyColumns),
    "nothing at all": NothingAtAll,
    "whole numbers": WholeNumbers,
    "wider type": WiderType,
}


@pytest.mark.parametrize(("name", "degree"), [(name, 2 + number % 2) for number, name in enumerate(MODELS)])
def test_is_exact(name: str, degree: int) -> None:
    model = MODELS[name]()
    lanes = kraken_compiler.transform(model, degree, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE
    assert relative_error(lanes, model, 2, 29) <= TOLERANCE
