"""The small reduces of means: how many, what travels together, what hides them. Means of late branches too."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.ir.forms import KRAKEN, STANDARD, Form
from kraken_compiler.ir.program import Planned
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.form.take_own_means import TakeOwnMeans
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.passes.pipelines import RECOGNIZE, schedule_as, split_over
from kraken_compiler.passes.schedule.reduce_means import ReduceMeans
from tests.passes.helpers import Sample, assert_close, captured, check_idempotent, check_untouched, gpt, targets
from tests.passes.models import COLUMNS, D, Ffn, Gpt, WideAttention, WideFfn


@cache
def sample() -> Sample:
    return captured(Gpt(attention=WideAttention, ffn=WideFfn))


class TwiceNormed(Ffn):
    """The second norm's means are those of what the first makes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(COLUMNS, eps=1e-6), nn.RMSNorm(COLUMNS, eps=1e-6)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.second(F.gelu(self.first(self.up(x_BSD)))))


def before(step: Pass[Any], form: Form, degree: int = 2) -> list[Pass[Any]]:
    """Everything up to a pass."""
    pipeline = [*RECOGNIZE, *split_over(degree), *schedule_as(form)]
    return pipeline[: pipeline.index(step)]


def fired(step: Pass[Any], sample: Sample, form: Form) -> tuple[int, Planned]:
    """How often a pass fires, and the program after it, in which it finds nothing more to do."""
    runner = PassRunner()
    program = runner.run(sample.after(*before(step, form)), [step])
    assert isinstance(program, Planned)
    check_idempotent(step, program)
    return runner.history[0].matches, program


def test_the_means_of_a_branch_travel_together() -> None:
    """Two of q and one of k in one reduce, two of the FFN in another, each before the reduce of the branch's parts."""
    old = sample().after(*before(ReduceMeans(), STANDARD))
    matches, program = fired(ReduceMeans(), sample(), STANDARD)
    assert matches == 5
    assert "kraken.mean_power" not in targets(program)
    starts = [targets(one).count("kraken.all_reduce_start") for one in (old, program)]
    assert starts == [1 + 2, 1 + 4], "one of the embedding's rows"
    assert [(reduce.first, reduce.last, reduce.is_inside) for reduce in program.plan.reduces] == [
        (1, 0, False),
        *((branch, branch, inside) for branch in (1, 2) for inside in (True, False)),
    ]
    assert [reduce.bytes_per_token // 8 for reduce in program.plan.reduces] == [D, 3, D, 2, D]
    assert_close(sample().run(sample().lanes(2, STANDARD)), sample().expected())


def test_means_of_means_wait_for_each_other() -> None:
    model = captured(Gpt(ffn=TwiceNormed))
    matches, program = fired(ReduceMeans(), model, STANDARD)
    assert matches == 2
    assert [(reduce.last, reduce.is_inside) for reduce in program.plan.reduces] == [
        (0, False),
        (1, False),
        (2, True),
        (2, True),
        (2, False),
    ]
    assert_close(model.run(model.lanes(2, STANDARD)), model.expected())


def test_a_projection_that_needs_no_mean_hides_them() -> None:
    """That of the values runs while the means of q and k are under way; the FFN has no other projection."""
    windows = sample().lanes(2, STANDARD).windows
    assert [len(window.gemms) for window in windows] == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("step", [TakeOwnMeans(), ReduceMeans()])
def test_what_has_no_means_is_left_alone(step: Pass[Any]) -> None:
    """Norms that nobody splits, and one lane."""
    check_untouched(step, gpt(), before=before(step, STANDARD))
    check_untouched(step, sample(), before=before(step, STANDARD, 1))


def test_fresh_branches_keep_the_means_of_all_lanes() -> None:
    check_untouched(TakeOwnMeans(), sample(), before=before(TakeOwnMeans(), STANDARD))


def test_late_branches_take_their_own() -> None:
    """Of a kraken model only the first branch reads what the source reads; a lane has half of the FFN's columns."""
    matches, program = fired(TakeOwnMeans(), sample(), KRAKEN)
    assert matches == 2
    assert targets(program).count("kraken.mean_power") == 3
    factors = [
        node.args[1]
        for node in program.graph.nodes
        if str(node.target) == "aten.mul.Tensor" and isinstance(node.args[1], float)
    ]
    assert factors == [2 / COLUMNS] * 2
    matches, program = fired(ReduceMeans(), sample(), KRAKEN)
    assert matches == 3
    assert [reduce.is_inside for reduce in program.plan.reduces].count(True) == 1
