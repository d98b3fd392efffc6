"""Embeddings by rows: what is split and what is not, that sums are exact, and that ties hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken_compiler.ir.forms import FORMS, KRAKEN, STANDARD, Form
from kraken_compiler.ir.program import LaneProgram, Program, parameter_count
from kraken_compiler.ir.schedule import AUTO
from kraken_compiler.ir.shards import SPLIT, WHOLE
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.ops.lane_embedding import lane_embedding
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.pipelines import RECOGNIZE, split_over
from kraken_compiler.passes.sample_inputs import token_input, vocabulary
from kraken_compiler.passes.shard.split_embedding import SplitEmbedding
from kraken_compiler.passes.shard.split_head import SplitHead
from kraken_compiler.passes.stages import schedule, with_cache, with_halves
from tests.passes.helpers import Golden, Sample, assert_close, captured, check_idempotent, check_untouched, gpt, targets
from tests.passes.models import VOCAB, D, Gpt


def before(degree: int) -> list[Pass[Any]]:
    """Everything up to the embedding."""
    pipeline = [*RECOGNIZE, *split_over(degree)]
    assert pipeline[-1] == SplitEmbedding()
    return pipeline[:-1]


def lanes(sample: Sample, degree: int, form: Form = STANDARD, choice: str = AUTO) -> LaneProgram:
    """The finished lane program."""
    return schedule(sample.after(*before(degree), SplitEmbedding(choice)), form)


def tables(program: Program, rows: int = VOCAB) -> list[tuple[int, ...]]:
    """The lanes' shapes of all floating-point weights with so many rows in the source."""
    return [
        spec.shape
        for spec in program.weights.values()
        if spec.source_shape[:1] == (rows,) and len(spec.source_shape) == 2
    ]


def tied() -> Sample:
    model = Gpt(2)
    model.head.weight = model.tokens.weight
    return captured(model)


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("model", [gpt, tied], ids=["untied", "tied"])
def test_splits_by_rows_and_sums(model: Callable[[], Sample], degree: int) -> None:
    """67 rows divide by no degree: the last lane is padded. A tied head reads the same rows."""
    sample = model()
    program = sample.after(*before(degree), SplitEmbedding())
    calls = targets(program)
    first = calls.index("kraken.lane_embedding")
    assert calls[first + 1 : first + 3] == ["kraken.all_reduce_start", "kraken.wait"]
    assert "aten.embedding" not in calls
    assert tables(program) == [(-(-VOCAB // degree), D)] * (1 if model is tied else 2)
    check_idempotent(SplitEmbedding(), program)
    finished = lanes(sample, degree)
    finished.check()
    assert_close(sample.run(finished), sample.expected())
    whole = sample.run(lanes(sample, degree, choice=WHOLE))
    assert all(torch.equal(one, other) for one, other in zip(sample.run(finished), whole, strict=True))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_computes_what_it_did(form: Form) -> None:
    sample = gpt(2)
    split, whole = (lanes(sample, 4, form, choice) for choice in (SPLIT, WHOLE))
    assert all(torch.equal(*pair) for pair in zip(sample.run(split), sample.run(whole), strict=True))
    first, *others = split.plan.reduces
    assert (first.first, first.last, first.awaited_by, first.window) == (1, 0, 1, ())
    assert first.is_lookup
    assert not first.is_inside
    assert first.bytes_per_token == D * 8
    assert not any(reduce.is_lookup for reduce in others)
    assert tuple(replace(reduce, index=reduce.index - 1) for reduce in others) == whole.plan.reduces
    assert split.windows[0].gemms == split.windows[0].promised == ()


def test_a_tied_model_holds_its_vocabulary_once() -> None:
    sample = tied()
    split, whole = (lanes(sample, 2, choice=choice) for choice in (SPLIT, WHOLE))
    assert parameter_count(whole) - parameter_count(split) == VOCAB * D
    assert sorted(tables(whole)) == [(34, D), (VOCAB, D)]


def test_what_does_not_save_a_hundredth_stays_whole() -> None:
    """`split` takes it all the same."""
    sample = gpt()
    saved = VOCAB * D * (1 - 1 / 2) / (sum(one.numel() for one in sample.module.parameters()) / 2)
    check_untouched(SplitEmbedding(AUTO, least_share=saved + 1e-6), sample, before=before(2))
    assert len(tables(sample.after(*before(2), SplitEmbedding(AUTO, least_share=saved - 1e-6)))) == 2
    always = sample.after(*before(2), SplitEmbedding(SPLIT, least_share=1.0))
    assert tables(always) == [(34, D)] * 2


def test_whole_one_lane_and_small_tables() -> None:
    check_untouched(SplitEmbedding(WHOLE), gpt(), before=before(2))
    check_untouched(SplitEmbedding(), gpt(), before=before(1))
    check_untouched(SplitEmbedding(SPLIT, smallest=18), gpt(), before=before(4))


def test_a_whole_head_keeps_the_embedding_that_it_is() -> None:
    pipeline = [step if not isinstance(step, SplitHead) else SplitHead(smallest=64) for step in before(2)]
    check_untouched(SplitEmbedding(), tied(), before=pipeline, why="reads all of the table")


class TwoTables(Gpt):
    """Tokens twice from one table, positions from another; `read` also uses the first in another way."""

    def __init__(self, read: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.positions = nn.Embedding(32, D)
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        x_BSD = self.tokens(ids) * 3.0 + self.tokens(ids.flip(0)) + self.positions(torch.arange(ids.shape[1]))
        if self.read is not None:
            x_BSD = x_BSD + self.read(self.tokens.weight)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


class Twice(Gpt):
    """Two lookups of one table, by the ids as they are, scaled; and positions that nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(32, D)

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        x_BSD = self.tokens(ids) * 3.0 + self.tokens(others) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


def two(batch: int, seq: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch * 100 + seq)
    return tuple(torch.randint(0, VOCAB, (batch, seq), generator=generator) for _ in range(2))


def test_several_lookups_of_one_table_and_positions() -> None:
    sample = captured(Twice(), two)
    program = lanes(sample, 3, KRAKEN)
    assert [reduce.is_lookup for reduce in program.plan.reduces] == [True, True, False]
    assert tables(program) == [(23, D)] * 2
    assert tables(program, rows=32) == [(32, D)], "positions are no tokens"
    assert_close(sample.run(lanes(sample, 3)), sample.expected())


@pytest.mark.parametrize("read", [None, lambda weight: weight.mean(0), lambda weight: weight[3]])
def test_tables_that_are_read_otherwise_stay_whole(read: Callable[[Tensor], Tensor] | None) -> None:
    """By ids that are computed, or as a matrix."""
    sample = captured(TwoTables(read))
    check_untouched(SplitEmbedding(SPLIT), sample, before=before(2), why="reads all of the table")
    assert_close(sample.run(lanes(sample, 2)), sample.expected())


def test_gradients_that_count_lookups_keep_a_table_whole() -> None:
    model = Gpt()
    model.tokens = nn.Embedding(VOCAB, D, scale_grad_by_freq=True)
    check_untouched(SplitEmbedding(), captured(model), before=before(2), why="how often a row is looked up")


def test_the_vocabulary_stays_known() -> None:
    program = lanes(gpt(), 2)
    inputs = token_input(program)
    assert inputs is not None
    assert inputs.name == "ids"
    assert vocabulary(program) == VOCAB


@pytest.mark.parametrize("model", [gpt, tied], ids=["untied", "tied"])
def test_with_a_cache_and_in_halves(model: Callable[[], Sample]) -> None:
    """The second half's lookup is summed while the first half attends; the first half's has nothing to hide behind."""
    sample = model()
    program = with_halves(with_cache(lanes(sample, 2)))
    assert program.cached is not None
    split = program.cached.split
    assert split is not None, program.cached.no_split
    program.check()
    first, second, *_ = split.plan.reduces
    assert (first.window, second.window) == ((), (1,))
    assert first.is_lookup
    assert second.is_lookup
    assert targets(program.cached.step).count("kraken.lane_embedding") == 1
    assert targets(split.program).count("kraken.lane_embedding") == 2
    rows = with_halves(lanes(sample, 2), "rows").rows
    assert rows is not None
    assert [reduce.window for reduce in rows.plan.reduces[:2]] == [(), (1,)]


def test_gradients_are_those_of_the_source() -> None:
    """Of a tied table they are those of its lookups and of its head; the padding row's lookups give none."""
    model = Gpt()
    model.tokens = nn.Embedding(VOCAB, D, padding_idx=40)
    model.head.weight = model.tokens.weight
    sample = captured(model)
    module = LaneModule.from_program(lanes(sample, 2), sample.read)
    ids = torch.tensor([[0, 33, 34, 40, 66, 40, 1, 33]])
    direction = torch.randn(1, 8, VOCAB, dtype=torch.float64)
    (module.run_flat([ids])[0] * direction).sum().backward()
    sample.module.zero_grad()
    (sample.module(ids) * direction).sum().backward()
    (name,) = (name for name, spec in module.program.weights.items() if spec.source_shape == (VOCAB, D))
    have = module.weights.get_parameter(name).grad
    want = model.tokens.weight.grad
    assert have is not None
    assert want is not None
    torch.testing.assert_close(have.flatten(0, 1)[:VOCAB], want, rtol=1e-9, atol=1e-9)
    assert not have.flatten(0, 1)[VOCAB:].any()


# The operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_the_sum_over_lanes_is_the_row_to_the_last_bit(padding_idx: int) -> None:
    """Also beside infinities and NaNs in other lanes' rows, and of negative zeros all but the sign."""
    weight = torch.randn(10, 4)
    weight[0], weight[4], weight[5], weight[9] = math.inf, math.nan, -math.inf, -0.0
    ids = torch.arange(10).reshape(2, 5)
    parts = [lane_embedding(weight[first : first + 5], ids, torch.tensor([first]), 10, padding_idx) for first in (0, 5)]
    want = F.embedding(ids, weight)
    torch.testing.assert_close(parts[0] + parts[1], want, rtol=0, atol=0, equal_nan=True)
    assert not parts[0][1].any()
    assert not parts[1][0].any()


def test_lanes_at_once() -> None:
    weight, ids, first = torch.randn(3, 4, 2), torch.tensor([[0, 11, 5]]), torch.tensor([[0], [4], [8]])
    at_once = torch.vmap(lane_embedding, (0, None, 0, None))(weight, ids, first, 12)
    one_by_one = [lane_embedding(weight[lane], ids, first[lane], 12) for lane in range(3)]
    assert torch.equal(at_once, torch.stack(one_by_one))
    assert torch.equal(at_once.sum(0), F.embedding(ids, weight.flatten(0, 1)))


def test_golden(golden: Golden) -> None:
    golden("split_embedding", gpt().after(*before(4), SplitEmbedding()), last=30)
