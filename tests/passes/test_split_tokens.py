from __future__ import annotations

import pytest
import torch

from kraken_compiler.ir.forms import FORMS, KRAKEN, STANDARD, Form
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.passes.cache.cache_attention import CacheAttention
from kraken_compiler.passes.schedule.split_tokens import SplitTokens
from kraken_compiler.passes.stages import with_cache, with_halves
from tests.lane_decoder import LaneDecoder
from tests.passes.helpers import assert_close, check_idempotent, gpt
from tests.passes.models import VOCAB

TOKENS = 11
ATTENTION = torch.ops.kraken.cached_attention.default
LINEAR = torch.ops.aten.linear.default


def split(form: Form = STANDARD, degree: int = 2, layers: int = 2) -> LaneProgram:
    return with_halves(with_cache(gpt(layers).lanes(degree, form)))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("cut", [1, 5, 10])
def test_halves_compute_the_same(form: Form, cut: int) -> None:
    program, read = split(form), gpt(2).read
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).expand(ids.shape)
    want = LaneDecoder(program, read, 2, 16).run(ids, positions)
    for positional in (False, True):
        assert_close(LaneDecoder(program, read, 2, 16).run(ids, positions, positional=positional, cut=cut), want)


def test_each_half_hides_behind_the_other() -> None:
    """Of a standard form, which hides nothing by itself: all but the first, of what the first half looks up, and the
    last two, of picked tokens.
    """
    program = split()
    assert program.cached is not None
    halves = program.cached.split
    assert halves is not None
    windows = measure_windows(halves.program.graph, halves.plan)
    assert halves.once == (3, 4)
    assert [window.promised for window in windows] == [(), (1,), (1,), (2,), (2,), (3,), (), ()]
    assert [len(window.gemms) for window in windows] == [0, 5, 5, 2, 2, 4, 0, 0]


def test_a_changed_form_hides_behind_both() -> None:
    program = split(KRAKEN, layers=4)
    assert program.cached is not None
    halves = program.cached.split
    assert halves is not None
    own = [len(window.gemms) for window in program.windows]
    windows = measure_windows(halves.program.graph, halves.plan)
    assert halves.once == (3, 4)
    assert [len(one.gemms) > own[number // 2] for number, one in enumerate(windows[:6])] == [False, *[True] * 5]
    assert windows[6].promised == program.windows[3].promised
    assert windows[6].gemms
    assert len(windows) == 8


def test_the_first_half_writes_its_keys_first() -> None:
    """In the order of the graph: both halves write into the same caches."""
    program = split()
    assert program.cached is not None
    assert program.cached.split is not None
    attentions = [node for node in program.cached.split.program.graph.nodes if node.target is ATTENTION]
    caches = [node.args[3].name for node in attentions]
    assert caches == [cache.key for cache in program.cached.plan.caches for _ in range(2)]
    assert [node.args[6].name for node in attentions] == ["first_slots", "slots"] * 2
    assert [node.args[7].name for node in attentions] == ["past", "second_past"] * 2


def test_what_is_computed_for_picked_tokens_is_there_once() -> None:
    program = split()
    assert program.cached is not None
    assert program.cached.split is not None
    step, halves = program.cached.step.graph, program.cached.split.program.graph
    products = [[node for node in graph.nodes if node.target is LINEAR] for graph in (step, halves)]
    once = 1 + 2 + 1  # an output projection, an FFN, and the vocabulary projection
    assert len(products[1]) == 2 * len(products[0]) - once
    weights = [node.args[1] for node in products[1]]
    assert all(weight.op == "placeholder" for weight in weights), "both halves read the same weights"


def test_the_step_graph_and_the_plan_stay() -> None:
    program = with_cache(gpt(2).lanes(2, STANDARD))
    assert program.cached is not None
    before = str(program.cached.step.graph), program.plan
    program = with_halves(program)
    assert program.cached is not None
    assert (str(program.cached.step.graph), program.plan) == before
    check_idempotent(SplitTokens(), program)
    check_idempotent(CacheAttention(), program)


def test_without_a_cache_there_is_nothing_to_split() -> None:
    program = gpt(2).lanes(2, STANDARD)
    assert SplitTokens().run(program).program is None
