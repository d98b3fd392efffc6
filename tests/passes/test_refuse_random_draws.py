from __future__ import annotations

import torch
import torch.nn.functional as F

from kraken_compiler.passes.normalize.refuse_random_draws import RefuseRandomDraws
from tests.passes.helpers import captured, check_untouched, hidden, targets
from tests.passes.test_drop_noops import Apply


def test_refuses_a_draw_by_name() -> None:
    rejection = captured(Apply(lambda x: F.dropout(x, 0.5)), hidden(4)).rejection(RefuseRandomDraws())
    assert rejection.nodes == ("dropout",)
    assert "draws random numbers ('dropout')" in rejection.reason


def test_removes_what_reaches_no_output() -> None:
    sample = captured(Apply(lambda x: x.sin() + 0 * torch.rand_like(x).shape[0]), hidden(4))
    assert "aten.rand_like" not in targets(sample.after(RefuseRandomDraws()))


def test_leaves_alone_what_is_switched_off() -> None:
    module = Apply(lambda x: F.alpha_dropout(F.dropout(x, 0.0), 0.5, training=False))
    check_untouched(RefuseRandomDraws(), captured(module, hidden(4)))
