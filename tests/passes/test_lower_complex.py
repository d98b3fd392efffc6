from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kraken_compiler.passes.normalize.drop_noops import DropNoops
from kraken_compiler.passes.normalize.lower_complex import LowerComplex
from tests.passes.helpers import assert_close, captured, check_untouched, hidden
from tests.passes.test_drop_noops import Apply

Z = torch.view_as_complex

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "turn": lambda x: torch.view_as_real(Z(x.unflatten(-1, (2, 2))) * torch.polar(x[..., :2], x[..., 2:])).flatten(-2),
    "conjugate": lambda x: torch.view_as_real(Z(x.unflatten(-1, (2, 2))).conj() * 1j).flatten(-2),
    "quotient": lambda x: (torch.complex(x, x + 1) / torch.complex(x * 0 + 2, x)).imag,
    "number quotient": lambda x: (torch.complex(x, x + 1) / (1 - 2j) - 3j + 1).real,
    "power": lambda x: (torch.complex(x, x + 1) ** 3).imag,
    "exponential": lambda x: torch.exp(torch.complex(x, x.sin())).real,
    "length and angle": lambda x: torch.complex(x, x + 1).abs() + torch.complex(x, x + 1).angle(),
    "moved": lambda x: torch.stack(torch.complex(x, x + 1).transpose(0, 1).chunk(2, -1), -1).flatten(-2).imag,
    "made": lambda x: (x * torch.full((4,), 2 + 1j, dtype=torch.complex128)).imag + torch.exp(1j * x).real,
    "broadcast": lambda x: torch.complex(x, x[:1]).imag + (x[:, :1] * 1j + x).imag,
    "cast": lambda x: (x.to(torch.complex128) * 2j).imag,
    "chosen": lambda x: torch.where(x > 0, torch.complex(x, x), x * 1j).imag,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_real_parts_compute_the_same(name: str) -> None:
    sample = captured(Apply(FORMULAS[name]), hidden(4))
    program = sample.after(DropNoops(), LowerComplex())
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not any(value.is_complex() for value in values if isinstance(value, Tensor))
    assert_close(sample.run(program), sample.expected())
    check_untouched(LowerComplex(), sample, before=[DropNoops(), LowerComplex()])


def test_refuses_what_has_no_rule() -> None:
    sample = captured(Apply(lambda x: torch.complex(x, x).sqrt().real), hidden(4))
    rejection = sample.rejection(DropNoops(), LowerComplex())
    assert rejection.nodes == ("sqrt",)
    assert "complex numbers" in rejection.reason
