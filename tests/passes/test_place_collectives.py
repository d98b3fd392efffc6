from __future__ import annotations

import pytest
import torch
from torch import fx

from kraken_compiler.ir.forms import FORMS, KRAKEN, LADDER, STANDARD, Form
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.passes.schedule.place_collectives import PlaceCollectives
from tests.passes.helpers import Golden, assert_close, check_idempotent, gpt

START = torch.ops.kraken.all_reduce_start.default
WAIT = torch.ops.kraken.wait.default


def of_first_branches(program: LaneProgram) -> tuple[fx.Node, fx.Node]:
    """Start and wait of the first reduce behind that of the embedding."""
    starts, waits = ([node for node in program.graph.nodes if node.target is target] for target in (START, WAIT))
    return starts[1], waits[1]


def lowered(form: Form, degree: int = 2) -> LaneProgram:
    return gpt(2).lanes(degree, form)


def test_kraken_hides_every_reduce_but_the_first_and_the_last_behind_an_attention() -> None:
    """The first is of the embedding's rows."""
    program = lowered(KRAKEN)
    lookup, first, last = program.windows
    assert (lookup.promised, lookup.gemms) == ((), ())
    assert first.promised == (3,)
    assert len(first.gemms) == 5, "q, k, v, the attention and its output projection"
    assert set(first.gemms) <= set(program.layers.branches[2].nodes)
    assert (last.promised, last.gemms) == ((), ())
    check_idempotent(PlaceCollectives(), program)


def test_ladder_hides_behind_the_next_branch() -> None:
    """The last two branches share a reduce: nobody reads the sum between them, and nothing is left to hide it."""
    assert [len(window.gemms) for window in lowered(LADDER).windows] == [0, 2, 5, 0]


def test_standard_promises_nothing() -> None:
    windows = lowered(STANDARD).windows
    assert [window.promised for window in windows] == [()] * 5
    assert [window.gemms for window in windows] == [()] * 5


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_starts_follow_their_operand_and_waits_precede_their_reader(form: Form) -> None:
    program = lowered(form)
    order = list(program.graph.nodes)
    for node in order:
        if node.target is START:
            assert node.prev is node.args[0]
        elif node.target is WAIT:
            assert node.next in node.users


def test_misplaced_collectives_are_moved_back() -> None:
    """A late start and an early wait cost the overlap; the pass restores both and the numbers hold."""
    sample = gpt(2)
    program = sample.lanes(2, KRAKEN)
    want, windows = sample.run(program), program.windows
    start, wait = of_first_branches(program)
    wait.prev.append(start)
    assert measure_windows(program.graph, program.plan)[1].gemms == ()
    result = PlaceCollectives().run(program)
    assert result.matches == 1
    assert not result.rejections
    assert isinstance(result.program, LaneProgram)
    assert result.program.windows == windows
    program.module.recompile()
    assert_close(sample.run(program), want)
    check_idempotent(PlaceCollectives(), program)


def test_an_empty_window_that_a_form_promises_is_an_error() -> None:
    """A reader of the sum that stands right behind the start leaves nothing to hide the reduce behind."""
    program = lowered(KRAKEN)
    start, wait = of_first_branches(program)
    with program.graph.inserting_after(start):
        early = program.graph.call_function(torch.ops.aten.cos.default, (wait,))
    early.meta["val"] = wait.meta["val"]
    (rejection,) = PlaceCollectives().run(program).rejections
    assert "reduce 1 should be hidden behind branches [3]" in rejection.reason
    assert rejection.nodes == (start.name, wait.name)
    assert measure_windows(program.graph, program.plan)[1].gemms == ()


def test_golden(golden: Golden) -> None:
    golden("place_collectives", lowered(KRAKEN))
