from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kraken_compiler.passes.normalize.canonicalize_layout import CanonicalizeLayout
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets
from tests.passes.test_drop_noops import Apply

ONE_PERMUTE: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "transpose from the end": lambda x: x.transpose(-1, -2),
    "swapaxes": lambda x: torch.ops.aten.swapaxes(x, 0, 2),
    "mT": lambda x: x.mT,
    "two transpositions": lambda x: x.transpose(0, 1).transpose(1, 2),
    "permute of a transpose": lambda x: x.transpose(0, 1).permute(2, 0, 1),
}
ONE_RESHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(x.shape[0], -1),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x, [x.shape[0], x.shape[1], 2, 2]),
    "view of a view": lambda x: x.view(x.shape[0], -1).view(x.shape[0], x.shape[1], 2, 2),
}
NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "there and back": lambda x: x.transpose(1, 2).mT,
    "permutation that moves nothing": lambda x: x.permute(0, -2, 2),
    "view and back": lambda x: x.view(x.shape[0], -1).view(x.shape[0], x.shape[1], 4),
    "one more dim and back": lambda x: x.unsqueeze(1).squeeze(-3),
}


@pytest.mark.parametrize("name", ONE_PERMUTE)
def test_writes_transpositions_as_one_permute(name: str) -> None:
    assert _calls(ONE_PERMUTE[name]) == ["aten.permute", "aten.cos"]


@pytest.mark.parametrize("name", ONE_RESHAPE)
def test_writes_views_as_one_reshape(name: str) -> None:
    assert _calls(ONE_RESHAPE[name]) == ["aten.reshape", "aten.cos"]


@pytest.mark.parametrize("name", NOTHING)
def test_drops_what_moves_nothing(name: str) -> None:
    assert _calls(NOTHING[name]) == ["aten.cos"]


def _calls(function: Callable[[Tensor], Tensor]) -> list[str]:
    sample = captured(Apply(function), hidden(4))
    program = sample.after(CanonicalizeLayout())
    assert all(torch.equal(one, other) for one, other in zip(sample.run(program), sample.expected(), strict=True))
    check_untouched(CanonicalizeLayout(), sample, before=[CanonicalizeLayout()])
    return [call for call in targets(program) if "sym_size" not in call]


def test_keeps_a_permute_whose_operand_others_read() -> None:
    def function(x: Tensor) -> Tensor:
        turned = x.permute(0, 2, 1)
        return turned.permute(2, 1, 0).sum() * turned

    program = check_pass(CanonicalizeLayout(), captured(Apply(function), hidden(4)), matches=1)
    assert targets(program).count("aten.permute") == 2


def test_leaves_other_layout_changes_alone() -> None:
    check_untouched(CanonicalizeLayout(), captured(Apply(lambda x: x.unsqueeze(1).permute(0, 2, 1, 3)), hidden(4)))
    check_untouched(CanonicalizeLayout(), captured(Apply(lambda x: x[..., :1].unsqueeze(1).squeeze(-1)), hidden(4)))


def test_golden(golden: Golden) -> None:
    def heads(x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2).transpose(2, 3)

    golden("canonicalize_layout", check_pass(CanonicalizeLayout(), captured(Apply(heads), hidden(4)), matches=4))
