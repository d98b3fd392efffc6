"""Units of branches and their lanes: any assignment gives the source's function in standard form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from kraken_compiler.errors import UnsupportedModelError
from kraken_compiler.ir.forms import KRAKEN, STANDARD, Form
from kraken_compiler.ir.index_set import to_indices
from kraken_compiler.ir.program import LaneProgram, Split
from kraken_compiler.ir.shards import Assignment
from kraken_compiler.passes.pipelines import RECOGNIZE, cut_to, plan_over
from kraken_compiler.passes.shard.assign_lanes import AssignLanes, Layout, Units
from kraken_compiler.passes.stages import schedule, split
from tests.lane_assignments import random_lanes, units
from tests.passes.helpers import Sample, assert_close, captured, check_idempotent, gpt
from tests.passes.models import AlibiAttention, Attention, FusedQkv, GainAttention, GatedFfn, Gpt

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: Gpt(2),
    "grouped": lambda: Gpt(2, attention=lambda: Attention(2)),
    "multi-query": lambda: Gpt(2, attention=lambda: Attention(1)),
    "fused": lambda: Gpt(2, attention=lambda: FusedQkv("contiguous")),
    "interleaved": lambda: Gpt(2, attention=lambda: FusedQkv("interleaved")),
    "by groups": lambda: Gpt(2, attention=lambda: FusedQkv("grouped", 2)),
    "alibi": lambda: Gpt(2, attention=AlibiAttention),
    "gains": lambda: Gpt(2, attention=GainAttention),
    "gate, up": lambda: Gpt(2, ffn=lambda: GatedFfn("chunk")),
    "gate and up": lambda: Gpt(2, ffn=lambda: GatedFfn("interleaved")),
}


def planned(sample: Sample, degree: int) -> Split:
    program: Split = sample.after(*RECOGNIZE, *plan_over(degree))
    return program


def lanes_of(sample: Sample, degree: int, assignment: Assignment, form: Form) -> LaneProgram:
    return schedule(split(sample.recognized, degree, assign=lambda _: assignment), form)


def test_positions_of_units() -> None:
    assert Layout(1, 4, 2).positions([1, 3]) == [2, 3, 6, 7]
    assert Layout(2, 4, 1).positions([0, 2]) == [0, 2, 4, 6]


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_standard_stays_the_source(name: str, degree: int) -> None:
    """Also where the degree does not divide the heads; the columns are divided whatever becomes of the heads."""
    sample = captured(MODELS[name]())
    assignment = random_lanes(planned(sample, degree))
    assert {2, 4} <= assignment.keys()
    program = lanes_of(sample, degree, assignment, STANDARD)
    program.check()
    assert program.assignment == assignment
    assert_close(sample.run(program), sample.expected())
    in_order = sample.lanes(degree, STANDARD)
    assert {name: spec.shape for name, spec in program.weights.items()} == {
        name: spec.shape for name, spec in in_order.weights.items()
    }
    assert any(spec.shards != in_order.weights[name].shards for name, spec in program.weights.items())


def test_a_changed_form_depends_on_it() -> None:
    sample = gpt(2)
    assignment = random_lanes(planned(sample, 2))
    one, other = (sample.run(lanes_of(sample, 2, lanes, KRAKEN)) for lanes in (assignment, {}))
    assert all((left - right).abs().max() > 1e-3 for left, right in zip(one, other, strict=True))


def test_units() -> None:
    found = units(planned(captured(MODELS["grouped"]()), 2))
    attention, ffn = found[1], found[2]
    assert isinstance(attention, Units)
    assert isinstance(ffn, Units)
    assert attention.lanes == ((0,), (1,)), "KV heads with their queries"
    assert (ffn.count, ffn.computed) == (24, 12)
    # One KV head alone lies on every lane, so that every query head may go to any.
    single = units(planned(captured(MODELS["multi-query"]()), 2))[1]
    assert isinstance(single, Units)
    assert single.count == 4


def test_heads_that_lanes_share_stay() -> None:
    assert units(planned(captured(MODELS["grouped"]()), 4))[1] == "lanes share KV heads"


def test_uneven_shares_are_padded_with_what_follows() -> None:
    program = planned(gpt(2), 3)
    found = units(program)[1]
    assert isinstance(found, Units)
    assert found.lanes == ((0,), (1,), (2, 3))
    program = split(gpt(2).recognized, 3, assign=lambda _: {1: ((1,), (2,), (0, 3))})
    columns = [to_indices(lane) for lane in program.shards[0].columns]
    assert columns[0] == list(range(4, 12))
    assert [len(lane) for lane in columns] == [8, 8, 8]
    assert to_indices(program.shards[0].owned[0]) == list(range(4, 8))


def test_it_changes_the_plan_once() -> None:
    program = planned(gpt(2), 2)
    step = AssignLanes(random_lanes(program))
    assert step.run(program).matches == len(step.assignment)
    check_idempotent(step, program)
    assert cut_to(2)[0].run(planned(gpt(2), 2)).matches == 0


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ({1: ((0,), (1, 2, 3))}, "do not have as many"),
        ({1: ((0, 1), (1, 3))}, "do not share"),
        ({1: ((1, 0), (2, 3))}, "not in an order"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused(assignment: Assignment, reason: str) -> None:
    """It may come out of an artifact that somebody has changed."""
    with pytest.raises(UnsupportedModelError, match=reason):
        split(gpt(2).recognized, 2, assign=lambda _: assignment)


def test_a_padded_lane_needs_something_behind_its_own() -> None:
    with pytest.raises(UnsupportedModelError, match="not in an order"):
        split(gpt(2).recognized, 3, assign=lambda _: {1: ((3,), (0,), (1, 2))})
