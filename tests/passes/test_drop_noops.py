from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.passes.normalize.drop_noops import DropNoops
from tests.passes.helpers import Golden, assert_close, captured, check_pass, check_untouched, hidden, targets


class Apply(nn.Module):
    """cos(function(x)): what remains of `function` shows as what stands before the cosine."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).cos()


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: torch.ops.aten.contiguous(x),
    "detach": lambda x: x.detach(),
    "alias": lambda x: torch.ops.aten.alias(x),
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "cast to the same dtype": lambda x: x.to(torch.float64),
    "full slice": lambda x: x[:, :, 0:],
    "slice as long as the dim": lambda x: x[:, :, :4],
    "view of the same shape": lambda x: x.view(x.shape[0], x.shape[1], 4),
    "expand to the same shape": lambda x: x.expand(-1, -1, 4),
    "plus zero": lambda x: x + 0,
    "times one": lambda x: x * 1.0,
    "over one": lambda x: x / 1,
    "concatenation with nothing": lambda x: torch.cat([x, x[..., 4:]], dim=-1),
}

SOMETHING: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "cast": ("aten.to.dtype", lambda x: x.to(torch.float32)),
    "part": ("aten.slice.Tensor", lambda x: x[:, :, :3]),
    "later tokens": ("aten.slice.Tensor", lambda x: x[:, 1:]),
    "reshape": ("aten.view", lambda x: x.view(x.shape[0], x.shape[1], 2, 2)),
    "broadcast": ("aten.expand", lambda x: x[:, :, :1].expand(-1, -1, 4)),
    "plus one": ("aten.add.Tensor", lambda x: x + 1),
    "times minus one": ("aten.mul.Tensor", lambda x: x * -1),
    "concatenation": ("aten.cat", lambda x: torch.cat([x, x[..., 3:]], dim=-1)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_drops(name: str) -> None:
    sample = captured(Apply(NOTHING[name]), hidden(4))
    program = sample.after(DropNoops())
    assert targets(program) == ["aten.cos"]
    assert all(torch.equal(one, other) for one, other in zip(sample.run(program), sample.expected(), strict=True))
    check_untouched(DropNoops(), sample, before=[DropNoops()])


@pytest.mark.parametrize("name", SOMETHING)
def test_keeps(name: str) -> None:
    """Indexing exports with full slices around it, and a cast with an assert, so the first run may find those."""
    call, function = SOMETHING[name]
    sample = captured(Apply(function), hidden(4))
    program = check_untouched(DropNoops(), sample, before=[DropNoops()])
    assert targets(program).count(call) == 1
    assert_close(sample.run(program), sample.expected())


def test_keeps_what_changes_the_dtype() -> None:
    """Adding 0.0 to whole numbers, or multiplying them by 1.0, makes them floats."""

    class Promote(nn.Module):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return ids + 0.0, ids * 1.0

    check_untouched(DropNoops(), captured(Promote()))


def test_drops_from_concatenations_only_what_is_empty() -> None:
    program = check_pass(
        DropNoops(), captured(Apply(lambda x: torch.cat([x[..., 4:], x, x.sin()], dim=-1)), hidden(4)), matches=1
    )
    assert targets(program) == ["aten.sin", "aten.cat", "aten.cos"]


def test_golden(golden: Golden) -> None:
    module = Apply(lambda x: F.dropout(x.clone().to(torch.float64) + 0, 0.1, training=False)[:, 1:])
    program = check_pass(DropNoops(), captured(module, hidden(4)), matches=6)
    golden("drop_noops", program)
