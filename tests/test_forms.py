"""Forms: the plan against an oracle, the lane program against an unrolled model, and a form that is only a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kraken_compiler.ir.forms import FORMS, KRAKEN, LADDER, PARALLEL, STANDARD, SYNC_DROP, Form, Lag
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import LaneProgram, Program
from kraken_compiler.ir.schedule import FormPlan
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.form.derive_schedule import derive_plan, parse_layers
from kraken_compiler.passes.lower import lower
from tests.passes.helpers import Sample, assert_close, gpt
from tests.passes.reference import UnrolledGpt

LATE = Form("late", Lag(1, 2), Lag(1, 4), "made up for this test: peers up to four branches late")
LAZY = Form("lazy", Lag(2, 5), Lag(3, 3), "made up for this test: own contributions late, too")
LAYERS = 3


def branches_of(layers: int, *, parallel: bool = False) -> tuple[Branch, ...]:
    """The branches of a model whose layers have one attention and one FFN."""
    return tuple(
        Branch(
            index=index + 1,
            layer=index // 2,
            kind="ffn" if index % 2 else "attention",
            path="",
            stream="",
            reads=index // 2 * 2 if parallel else index,
            output="",
            nodes=(),
        )
        for index in range(2 * layers)
    )


def oracle(branches: Sequence[Branch], forms: Sequence[Form]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """By brute force: what every branch reads (own, peers), and which branches share a reduce (first, last).

    A branch may know of contribution m what the equation says and what its source read knew. Contributions m and m + 1
    share a reduce unless some read, or the end, knows the one of the peers and not the other.
    """
    reads = []
    for k, branch in enumerate(branches, 1):
        lag = forms[branch.layer].lag(branch.kind)
        known = range(1, branch.reads + 1)
        own = {m for m in known if m <= k - lag.own}
        peers = {m for m in known if m <= k - lag.peers}
        reads.append((len(own), len(peers)))
    knows = [{m for m in range(1, len(branches) + 1) if m <= peers} for _, peers in reads]
    groups: list[list[int]] = []
    for m in range(1, len(branches) + 1):
        apart = any((m in known) != (m - 1 in known) for known in knows)
        if groups and not apart:
            groups[-1].append(m)
        else:
            groups.append([m])
    return reads, [(group[0], group[-1]) for group in groups]


def check(plan: FormPlan, branches: Sequence[Branch], forms: Sequence[Form]) -> None:
    reads, groups = oracle(branches, forms)
    assert [(read.own, read.peers) for read in plan.reads] == reads
    assert [read.branch for read in plan.reads] == list(range(1, len(branches) + 1))
    assert [(reduce.first, reduce.last) for reduce in plan.reduces] == groups
    for number, reduce in enumerate(plan.reduces):
        needing = [k for k, (_, peers) in enumerate(reads, 1) if peers >= reduce.last]
        assert reduce.index == number
        assert reduce.awaited_by == (min(needing) if needing else None)
        until = min(needing) if needing else len(branches) + 1
        assert reduce.window == tuple(k for k in range(1, len(branches) + 1) if reduce.last < k < until)
    assert plan.forms == tuple(form.name for form in forms)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", [*FORMS.values(), LATE, LAZY], ids=lambda form: form.name)
def test_plan_is_what_the_read_equation_says(form: Form, parallel: bool) -> None:
    for layers in (1, 2, 5):
        branches = branches_of(layers, parallel=parallel)
        check(derive_plan(branches, [form] * layers), branches, [form] * layers)


@pytest.mark.parametrize("parallel", [False, True])
def test_plan_of_mixed_forms(parallel: bool) -> None:
    """Every pair of forms next to each other, both ways round, between standard layers."""
    branches = branches_of(4, parallel=parallel)
    for first in (*FORMS.values(), LATE, LAZY):
        for second in (*FORMS.values(), LATE, LAZY):
            forms = [STANDARD, first, second, STANDARD]
            check(derive_plan(branches, forms), branches, forms)


def test_kraken_is_one_reduce_a_layer_behind_the_next_attention() -> None:
    plan = derive_plan(branches_of(3), [KRAKEN] * 3, bytes_per_token=64)
    assert [(r.first, r.last, r.awaited_by, r.window) for r in plan.reduces] == [
        (1, 2, 4, (3,)),
        (3, 4, 6, (5,)),
        (5, 6, None, ()),
    ]
    assert {reduce.bytes_per_token for reduce in plan.reduces} == {64}
    assert [(read.own, read.peers) for read in plan.reads] == [(0, 0), (1, 0), (2, 0), (3, 2), (4, 2), (5, 4)]


@pytest.mark.parametrize(
    ("form", "parallel", "want"),
    [
        (STANDARD, False, [(1, 1, 2), (2, 2, 3), (3, 3, 4), (4, 4, None)]),
        (LADDER, False, [(1, 1, 3), (2, 2, 4), (3, 4, None)]),
        (SYNC_DROP, False, [(1, 2, 3), (3, 4, None)]),
        (PARALLEL, False, [(1, 2, 3), (3, 4, None)]),
        (STANDARD, True, [(1, 2, 3), (3, 4, None)]),
        (KRAKEN, True, [(1, 2, 4), (3, 4, None)]),
    ],
    ids=lambda value: value.name if isinstance(value, Form) else None,
)
def test_reduces_of_two_layers(form: Form, parallel: bool, want: list[tuple[int, int, int | None]]) -> None:
    plan = derive_plan(branches_of(2, parallel=parallel), [form] * 2)
    assert [(reduce.first, reduce.last, reduce.awaited_by) for reduce in plan.reduces] == want


def test_kraken_of_parallel_layers_reads_own_contributions_as_the_source() -> None:
    """Attention sees its peers up to the end of layer l-2, the FFN up to the end of layer l-1."""
    plan = derive_plan(branches_of(3, parallel=True), [KRAKEN] * 3)
    assert [(read.own, read.peers) for read in plan.reads] == [(0, 0), (0, 0), (2, 0), (2, 2), (4, 2), (4, 4)]


def test_lags_that_make_no_sense() -> None:
    for own, peers in ((0, 1), (2, 1), (1, 0)):
        with pytest.raises(ValueError, match="1 <= own <= peers"):
            Lag(own, peers)
    assert STANDARD.exact
    assert not any(form.exact for form in FORMS.values() if form is not STANDARD)


# The lane program against the unrolled model ----------------------------------------------------------------------


def sample(parallel: bool = False) -> Sample:
    return gpt(LAYERS, parallel)


def lowered(form: Form, degree: int, layers: str | None = None, parallel: bool = False) -> LaneProgram:
    return lower(sample(parallel).program, degree, form, layers)[0]


@pytest.mark.parametrize(
    ("form", "degree", "layers", "parallel"),
    [
        (STANDARD, 4, None, False),
        (KRAKEN, 2, None, False),
        (KRAKEN, 4, None, False),
        (KRAKEN, 4, "0,2", False),
        (LADDER, 4, None, False),
        (SYNC_DROP, 2, None, False),
        (PARALLEL, 2, None, False),
        (LATE, 4, None, False),
        (LATE, 2, "-3--2", False),
        (LAZY, 2, None, False),
        (STANDARD, 4, None, True),
        (KRAKEN, 4, None, True),
        (LATE, 2, "1-2", True),
    ],
    ids=lambda value: value.name if isinstance(value, Form) else str(value),
)
def test_lane_program_is_the_read_equation(form: Form, degree: int, layers: str | None, parallel: bool) -> None:
    """`LATE` and `LAZY` are known to nobody but this test: a form is a row of data."""
    source = sample(parallel)
    program = lowered(form, degree, layers, parallel)
    chosen = range(LAYERS) if layers is None else parse_layers(layers, LAYERS)
    forms = [form if layer in chosen else STANDARD for layer in range(LAYERS)]
    reference = UnrolledGpt(source.module, degree, forms, parallel)
    with torch.no_grad():
        want = [reference(*given) for given in source.inputs]
    assert_close(source.run(program), want)
    same = all(torch.allclose(one, other) for one, other in zip(want, source.expected(), strict=True))
    assert same == (form is STANDARD)


@pytest.mark.parametrize("form", [KRAKEN, LATE], ids=lambda form: form.name)
def test_gradients_are_those_of_the_unrolled_model(form: Form) -> None:
    source, degree = sample(), 4
    program = lowered(form, degree)
    module = LaneModule.from_program(program, source.read)
    reference = UnrolledGpt(source.module, degree, [form] * LAYERS)
    (ids,) = source.inputs[1]
    cotangent = torch.randn(*ids.shape, 67, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (module.run_flat([ids])[0] * cotangent).sum().backward()
    (reference(ids) * cotangent).sum().backward()
    for spec in (spec for spec in program.weights.values() if spec.kind == "parameter"):
        have = module.weights.get_parameter(spec.name).grad
        assert have is not None
        parts = reference.parts[spec.source]
        if not spec.shards:
            torch.testing.assert_close(have, parts[0].grad, rtol=1e-8, atol=1e-10)
            continue
        for lane, part in enumerate(parts):
            # The last lane's share of the vocabulary is padded; nothing flows to the padding.
            torch.testing.assert_close(have[lane][: len(part)], part.grad, rtol=1e-8, atol=1e-10)
            assert not have[lane][len(part) :].any()


@pytest.mark.parametrize("parallel", [False, True])
def test_one_lane_with_own_lag_one_is_the_source(parallel: bool) -> None:
    source = sample(parallel)
    for form in (*FORMS.values(), LATE):
        have = source.run(lowered(form, 1, parallel=parallel))
        same = all(torch.allclose(one, other) for one, other in zip(have, source.expected(), strict=True))
        # Layers that are parallel in the source read no further than the parallel form does.
        assert same == (form.attention.own == form.ffn.own == 1 or (parallel and form is PARALLEL))


def test_a_form_leaves_the_captured_program_alone() -> None:
    source = sample()
    before = [node.name for node in source.program.graph.nodes]
    lowered(replace(KRAKEN, name="renamed"), 2)
    assert [node.name for node in source.program.graph.nodes] == before
    assert source.program.degree == 1
    assert type(source.program) is Program


# Layer selections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("3", (3,)),
        ("-1", (9,)),
        ("2-4", (2, 3, 4)),
        ("-3--1", (7, 8, 9)),
        ("8--1", (8, 9)),
        ("-10-1", (0, 1)),
        ("5, 0,2-3", (0, 2, 3, 5)),
        ("1,1-2,2", (1, 2)),
    ],
)
def test_layer_selections(text: str, want: tuple[int, ...]) -> None:
    assert parse_layers(text, 10) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "layers 0 to 9, there is no layer 10"),
        ("-11", "there is no layer -11"),
        ("5-12", "there is no layer 12"),
        ("4-2", "range '4-2' is empty"),
        ("-1--3", "range '-1--3' is empty"),
        ("all", "'all' is no layer or range"),
        ("1,,2", "'' is no layer or range"),
        ("1-2-3", "'1-2-3' is no layer or range"),
        ("", "'' is no layer or range"),
    ],
)
def test_wrong_layer_selections(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 10)
