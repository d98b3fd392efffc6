from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kraken_compiler.ir.forms import FORMS, Form
from kraken_compiler.ir.program import LaneProgram, SplitRun
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.schedule.split_rows import SplitRows
from kraken_compiler.passes.stages import with_cache
from tests.passes.helpers import assert_close, captured, check_idempotent, gpt
from tests.passes.models import VOCAB, D, Gpt


def split(form: Form, layers: int = 2) -> tuple[LaneProgram, SplitRun]:
    program = gpt(layers).lanes(2, form)
    result = SplitRows().run(program).program
    assert isinstance(result, LaneProgram)
    assert result.rows is not None, result.no_rows
    return result, result.rows


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("cut", [1, 2])
def test_halves_compute_the_same(form: Form, cut: int) -> None:
    program, rows = split(form)
    read = read_from_source(program, gpt(2).read)
    ids = torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
    (want,) = StreamingProgram(program, read).run_flat([ids])
    parts = StreamingProgram(rows.program, read).run_flat(rows.dims.flat(rows.dims.halves([ids], cut)))
    assert_close(torch.cat(list(parts)), want)
    assert len(parts[0]) == cut


def test_each_half_hides_behind_the_other() -> None:
    _, rows = split(FORMS["standard"])
    windows = measure_windows(rows.program.graph, rows.plan)
    # The first half's lookups have nothing to hide behind, the second's have the first half's attention.
    assert [window.promised for window in windows] == [(), (1,), (1,), (2,), (2,), (3,), (3,), (4,), (4,), ()]
    assert [len(window.gemms) for window in windows] == [0, 5, 5, 2, 2, 5, 5, 2, 2, 1]


def test_the_program_stays() -> None:
    program = gpt(2).lanes(2, FORMS["standard"])
    before = str(program.graph)
    result, _ = split(FORMS["standard"])
    assert str(result.graph) == before
    check_idempotent(SplitRows(), result)
    cached = SplitRows().run(with_cache(program)).program
    assert isinstance(cached, LaneProgram)
    assert cached.rows is not None
    rejected = SplitRows().run(replace(program, call=replace(program.call, sizes=("batch % 2 == 0",)))).program
    assert isinstance(rejected, LaneProgram)
    assert "not every number of rows suits it" in rejected.no_rows


class Embedding(nn.Embedding):
    """An embedding behind which something is done with a batch, [B, S, D]."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__(VOCAB, D)
        self.then = then

    def forward(self, ids: Tensor) -> Tensor:
        return self.then(super().forward(ids))


def rows_of(then: Callable[[Tensor], Tensor]) -> LaneProgram:
    model = Gpt()
    model.tokens = Embedding(then)
    result = SplitRows().run(captured(model).lanes(2, FORMS["standard"])).program
    assert isinstance(result, LaneProgram)
    return result


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda x: x - x.mean(0, keepdim=True), "mean works along the batch"),
        (lambda x: x + x.flip(0), "flip works along the batch"),
        (lambda x: x + x[:1], "slice works along the batch"),
        (lambda x: x * x.shape[0], "mul computes with the number of rows"),
        (lambda x: x + torch.arange(x.shape[0])[:, None, None], "arange computes with the number of rows"),
        (lambda x: x + torch.full((1,), x.shape[0]), "full computes with the number of rows"),
        (lambda x: x + x.new_full((1,), x.shape[0]), "new_full computes with the number of rows"),
        (lambda x: x + x.sum(), "sum"),
        (lambda x: x[torch.arange(x.shape[0])], "arange computes with the number of rows"),
        (lambda x: x + x[:1, :1].repeat(x.shape[0], 1, 1), "slice works along the batch"),
    ],
)
def test_rows_that_meet_or_are_counted_stay_together(then: Callable[[Tensor], Tensor], reason: str) -> None:
    program = rows_of(then)
    assert program.rows is None
    assert reason in program.no_rows


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x + x.new_zeros(x.shape[0], 1, 1),
        lambda x: x + torch.arange(x.shape[1])[None, :, None].repeat(x.shape[0], 1, 1),
        lambda x: torch.where(x > 0, x, 0.5 * x),
        lambda x: x + torch.ones(x.shape[1], x.shape[1]).triu().sum(-1)[None, :, None],
        lambda x: x.repeat(1, 1, 2)[..., :D],
    ],
)
def test_rows_that_only_look_as_if_they_met(then: Callable[[Tensor], Tensor]) -> None:
    program = rows_of(then)
    assert program.rows is not None, program.no_rows
