from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.passes.normalize.fuse_rms_norm import FuseRmsNorm
from tests.passes.helpers import (
    Golden,
    assert_close,
    captured,
    check_idempotent,
    check_pass,
    check_untouched,
    hidden,
    targets,
)

EPS = 1e-3
Formula = Callable[[Tensor, Tensor], Tensor]


class Norm(nn.Module):
    """formula(x [B, S, 4], weight [4])"""

    def __init__(self, formula: Formula, width: int = 4) -> None:
        super().__init__()
        self.formula, self.weight = formula, nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight).cos()


def root(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """Llama in half precision: the norm in float32, the weight in the model's type."""
    wide = x.float()
    return weight * (wide * root(wide)).to(x.dtype)


def widened_weight(x: Tensor, weight: Tensor) -> Tensor:
    """Gemma in half precision: weight and norm in float32, the product cast back."""
    wide = x.float()
    return (wide * root(wide) * (1.0 + weight.float())).to(x.dtype)


NORMS: dict[str, Formula] = {
    "weight in front": lambda x, w: w * (x * root(x)),
    "weight behind": lambda x, w: (x * root(x)) * w,
    "root in front": lambda x, w: w * (root(x) * x),
    "square by product": lambda x, w: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)),
    "square": lambda x, w: w * (x * torch.rsqrt(x.square().mean(dim=2, keepdim=True) + EPS)),
    "weight plus one": lambda x, w: (x * root(x)) * (1 + w),
    "without weight": lambda x, w: x * root(x),
}
OTHERS: dict[str, Formula] = {
    "other tensor scaled": lambda x, w: w * (x.cos() * root(x)),
    "mean over tokens": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)),
    "mean over all": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS)),
    "third power": lambda x, w: w * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS)),
    "learned epsilon": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.exp())),
    "root read twice": lambda x, w: _twice(x),
}


WHY = {
    "other tensor scaled": "is not what was squared",
    "mean over tokens": "not over the last dim alone",
    "mean over all": "not over the last dim alone",
    "third power": "not of squares",
    "learned epsilon": "no plain number",
    "root read twice": "read more than once",
}


def _twice(x: Tensor) -> Tensor:
    scale = root(x)
    return x * scale + scale


@pytest.mark.parametrize("name", NORMS)
def test_fuses(name: str) -> None:
    program = check_pass(FuseRmsNorm(), captured(Norm(NORMS[name]), hidden(4)), matches=1)
    calls = targets(program)
    assert calls.count("aten.rms_norm") == 1
    assert "aten.rsqrt" not in calls


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_others_alone(name: str) -> None:
    check_untouched(FuseRmsNorm(), captured(Norm(OTHERS[name]), hidden(4)), why=WHY[name])


def test_a_weight_that_broadcasts_stays_outside() -> None:
    """One factor for all columns is no weight of the fused norm."""
    program = check_pass(FuseRmsNorm(), captured(Norm(NORMS["weight behind"], width=1), hidden(4)), matches=1)
    assert [call for call in targets(program) if "sym" not in call] == ["aten.rms_norm", "aten.mul.Tensor", "aten.cos"]


@pytest.mark.parametrize("formula", [widened, widened_weight])
def test_half_precision_keeps_its_rounding(formula: Formula) -> None:
    """The fused norm computes in float32 inside, as the formula does."""
    sample = captured(Norm(formula), hidden(4, dtype=torch.bfloat16), dtype=torch.bfloat16)
    program = sample.after(FuseRmsNorm())
    assert_close(sample.run(program), sample.expected(), tolerance=2e-2)
    assert all(out.dtype is torch.bfloat16 for out in sample.run(program))
    check_idempotent(FuseRmsNorm(), program)


def test_half_precision_that_stays_wide_is_left_alone() -> None:
    sample = captured(
        Norm(lambda x, w: NORMS["without weight"](x.float(), w)), hidden(4, dtype=torch.bfloat16), dtype=torch.bfloat16
    )
    check_untouched(FuseRmsNorm(), sample, why="not cast back")


def test_golden(golden: Golden) -> None:
    golden("fuse_rms_norm", check_pass(FuseRmsNorm(), captured(Norm(NORMS["weight in front"]), hidden(4)), matches=1))
