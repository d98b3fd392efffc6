from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kraken_compiler.passes.normalize.drop_noops import DropNoops
from kraken_compiler.passes.normalize.hoist_sizes import HoistSizes
from kraken_compiler.passes.normalize.lower_writes import LowerWrites
from tests.passes.helpers import assert_close, captured, check_untouched, hidden, targets
from tests.passes.test_drop_noops import Apply


def _halves(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., :2], out[..., 2:] = x[..., 2:].sin(), x[..., :2]
    return out


def _between(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., ::2], out[..., 1::2] = x[..., 1::2].sin(), x[..., ::2]
    return out


def _all_but_the_last(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :-1] = x[:, 1:].sin()
    return x


def _one_token(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 2.0
    return x


def _where_negative(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0.5
    return x


def _columns(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., [0, 2]] = 1.0
    return x


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": _halves,
    "every other": _between,
    "all but the last": _all_but_the_last,
    "one token": _one_token,
    "a mask": _where_negative,
    "a copy": lambda x: torch.zeros(x.shape, dtype=torch.float32).copy_(x).double(),
    "zeros": lambda x: x.clone().zero_() + x,
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_become_values(name: str) -> None:
    sample = captured(Apply(WRITES[name]), hidden(4))
    program = sample.after(DropNoops(), LowerWrites())
    assert_close(sample.run(program), sample.expected())
    assert not {"aten.copy", "aten.slice_scatter", "aten.select_scatter", "aten.index_put"} & set(targets(program))
    check_untouched(LowerWrites(), sample, before=[DropNoops(), LowerWrites()])


def test_what_was_overwritten_is_not_read() -> None:
    for name in ("halves", "every other"):
        program = captured(Apply(WRITES[name]), hidden(4)).after(DropNoops(), LowerWrites(), HoistSizes())
        assert "aten.empty_like" not in targets(program)


def test_positions_from_a_list_stay() -> None:
    sample = captured(Apply(_columns), hidden(4))
    assert "aten.index_put" in targets(sample.after(DropNoops(), LowerWrites()))
