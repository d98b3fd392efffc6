"""Models that draw random numbers in evaluation mode are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kraken_compiler
from kraken_compiler.errors import UnsupportedModelError
from tests.reports.small_models import EXAMPLE, FFN, LM, TOLERANCE, Attention, relative_error


class DroppedScores(Attention):
    """The report's: nanoGPT before its fix."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)


class DefaultDropout(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.dropout(super().forward(x_BSD))


class DroppedColumns(FFN):
    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x_BSD))
        return self.down(hidden * torch.bernoulli(torch.full((hidden.shape[-1],), 0.5)))


class Noise(LM):
    def embed(self, ids: Tensor) -> Tensor:
        x_BSD = super().embed(ids)
        return x_BSD + 0.01 * torch.randn_like(x_BSD)


class Sampling(LM):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.multinomial(super().forward(ids)[:, -1].softmax(-1), 1)


class StubbornDropout(Attention):
    """Stays in training mode, for an estimate of its uncertainty."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def train(self, mode: bool = True) -> StubbornDropout:
        super().train(mode)
        self.drop.train()
        return self

    def project(self, y_BSD: Tensor) -> Tensor:
        return self.drop(super().project(y_BSD))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "scores": (lambda: LM(DroppedScores), "attention.0", "scaled_dot_product_attention"),
    "F.dropout": (lambda: LM(ffn=DefaultDropout), "ffn.0", "dropout"),
    "bernoulli": (lambda: LM(ffn=DroppedColumns), "ffn.0", "bernoulli"),
    "noise": (Noise, "", "randn_like"),
    "sampling": (Sampling, "", "multinomial"),
    "a module that stays in training mode": (lambda: LM(StubbornDropout), "attention.0.drop", "dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name: str) -> None:
    build, path, operator = REFUSED[name]
    with pytest.raises(UnsupportedModelError) as caught:
        kraken_compiler.transform(build(), 2, "standard", example_inputs=EXAMPLE)
    (rejection,) = caught.value.rejections
    assert rejection.path == path
    assert rejection.nodes[0].startswith(operator)
    assert f"draws random numbers ('{operator}') in evaluation mode" in rejection.reason
    assert "degree" not in str(rejection)
    assert ("self.training" in rejection.hint) == ("dropout" in operator or "attention" in operator)


class OffDropout(Attention):
    """Drops in training only, at a rate of 0 where it does not ask, and throws away what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.rand_like(q)
        v = F.dropout(v, 0.0)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)

    def project(self, y_BSD: Tensor) -> Tensor:
        return F.dropout(self.drop(super().project(y_BSD)), 0.3, self.training)


class RandomSlopes(FFN):
    """A leaky ReLU whose slope is drawn in training, and the mean one else."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.rrelu(self.up(x_BSD), 0.1, 0.5, self.training))


@pytest.mark.parametrize("degree", [1, 3])
def test_slopes_that_are_drawn_in_training_only_are_exact(degree: int) -> None:
    model = LM(ffn=RandomSlopes)
    lanes = kraken_compiler.transform(model, degree, "standard", example_inputs=EXAMPLE)
    assert relative_error(lanes, model, 3, 11) <= TOLERANCE


@pytest.mark.parametrize("training", [False, True])
def test_what_draws_in_training_only_is_exact(training: bool) -> None:
    model = LM(OffDropout).train(training)
    lanes = kraken_compiler.transform(model, 3, "standard", example_inputs=EXAMPLE)
    assert model.training == training
    assert relative_error(lanes.eval(), model.eval(), 3, 11) <= TOLERANCE
