"""The stages of a compile: captured, recognised, split, scheduled, with a KV cache. None changes what it is given.

    recognize(captured)          ->  Recognized    once a model
    split(recognized, degree)    ->  Split         once a degree; which lane has what may be chosen for a form
    schedule(split, forms)       ->  LaneProgram   once for every choice of forms
    with_cache(lane)             ->  LaneProgram   once for what is written
    with_halves(lane, overlap)   ->  LaneProgram   likewise

Each runs one pipeline of `pipelines.py`. A runner that goes from stage to stage gathers their history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kraken_compiler.errors import UnsupportedModelError
from kraken_compiler.ir.forms import Form
from kraken_compiler.ir.program import LaneProgram, Program, Recognized, Split, Stage
from kraken_compiler.ir.schedule import AUTO, ROWS, TOKENS
from kraken_compiler.ir.shards import Assignment
from kraken_compiler.passes.compiler_pass import Pass
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.passes.pipelines import (
    CACHE,
    HALVES,
    RECOGNIZE,
    cut_to,
    join_lanes,
    plan_over,
    schedule_as,
    split_over,
)
from kraken_compiler.passes.shard.degrees import DEGREE_HINT, even_degrees, valid_degrees

Assign = Callable[[Split], Assignment]
"""Function from a program whose split is planned to the heads and columns that lanes take."""

_MOST_TRIES = 3
_NO_DEGREE_HINT = (
    "Other degrees were tried and do not help: between their projections, attention must keep its heads apart and an "
    "FFN its columns."
)


def recognize(captured: Program, runner: PassRunner | None = None) -> Recognized:
    """Bring a captured program into normal form and find its layers. Keeps the numbers.

    Raises:
        UnsupportedModelError: It is no Transformer, or has parts of another kind.
    """
    return _run_pipeline(Recognized, captured, RECOGNIZE, runner)


def split(
    recognized: Recognized,
    degree: int,
    runner: PassRunner | None = None,
    *,
    embedding: str = AUTO,
    assign: Assign | None = None,
) -> Split:
    """Cut every branch to the share of one of `degree` lanes, and the vocabulary.

    Args:
        recognized: A recognised program.
        degree: Number of lanes.
        runner: Gathers the history.
        embedding: What lanes hold of embeddings, see `SplitEmbedding`.
        assign: Chooses heads and columns for the lanes; None takes them in the order of the files.

    Raises:
        UnsupportedModelError: A branch cannot be cut so; the hint names another degree only if that was found to work.
    """
    with _hints_of_degrees(recognized, degree):
        planned = plan(recognized, degree, runner)
        return cut(planned, assign(planned) if assign is not None else {}, runner, embedding=embedding)


def plan(recognized: Recognized, degree: int, runner: PassRunner | None = None) -> Split:
    """Find the parts that lanes have, and cut nothing: the dear half of `split`, for who cuts more than once.

    Raises:
        UnsupportedModelError: See `split`.
    """
    with _hints_of_degrees(recognized, degree):
        return _run_pipeline(Split, recognized, plan_over(degree), runner)


def cut(planned: Split, assignment: Assignment, runner: PassRunner | None = None, *, embedding: str = AUTO) -> Split:
    """Cut a program whose split is planned to one lane, which has the heads and columns of an assignment."""
    degree = len(planned.shards[0].owned)
    return _run_pipeline(Split, planned, cut_to(degree, embedding, assignment), runner)


def schedule(split: Split, forms: Form | tuple[Form, ...], runner: PassRunner | None = None) -> LaneProgram:
    """Give the layers their forms: one for all, or one for each.

    Raises:
        UnsupportedModelError: Nothing would run while a reduce is under way that a form hides.
    """
    return _run_pipeline(LaneProgram, split, schedule_as(forms), runner)


def join(
    recognized: Recognized, degree: int, runner: PassRunner | None = None, *, whole_head: bool = False
) -> LaneProgram:
    """Make the recognised lane of a Kraken model a lane program: its weights are one of many, and lanes meet.

    Args:
        recognized: The first lane by itself.
        degree: How many lanes the model has.
        runner: Gathers the history.
        whole_head: Every lane computes all logits.

    Raises:
        UnsupportedModelError: Its lanes are not joined as those of a Kraken model.
    """
    return _run_pipeline(LaneProgram, recognized, join_lanes(degree, whole_head), runner)


def with_cache(lane: LaneProgram, runner: PassRunner | None = None) -> LaneProgram:
    """Add the program with a KV cache, or why there is none. It takes as long as all the rest."""
    return _run_pipeline(LaneProgram, lane, CACHE, runner)


def with_halves(lane: LaneProgram, overlap: str = AUTO, runner: PassRunner | None = None) -> LaneProgram:
    """Add the graph that runs in two halves, or why there is none.

    Args:
        lane: A lane program.
        overlap: What is cut: the `tokens` of a prefill, which takes a KV cache, the `rows` of a batch, or `none`;
            `auto` takes tokens where there is a cache.
        runner: Gathers the history.
    """
    if overlap == AUTO:
        overlap = ROWS if lane.cached is None else TOKENS
    return _run_pipeline(LaneProgram, lane, HALVES[overlap], runner)


def _run_pipeline(
    stage: type[Stage], program: Program, pipeline: Sequence[Pass[Any]], runner: PassRunner | None
) -> Stage:
    result = (runner or PassRunner()).run(program.copy(), pipeline)
    assert isinstance(result, stage)
    return result


@contextmanager
def _hints_of_degrees(recognized: Recognized, degree: int) -> Iterator[None]:
    """Where a rejection says that another degree may do, let it name one that does."""
    try:
        yield
    except UnsupportedModelError as error:
        if all(rejection.hint != DEGREE_HINT for rejection in error.rejections):
            raise
        hint = _degree_hint(recognized, degree)
        rejections = [
            replace(rejection, hint=hint) if rejection.hint == DEGREE_HINT else rejection
            for rejection in error.rejections
        ]
        raise UnsupportedModelError(rejections) from None


def _degree_hint(recognized: Recognized, degree: int) -> str:
    degrees = dict.fromkeys((*even_degrees(recognized.layers), *valid_degrees(recognized.layers)))
    others = [other for other in degrees if other not in (1, degree)][:_MOST_TRIES]
    working_degree = next((other for other in others if _splits(recognized, other)), None)
    return _NO_DEGREE_HINT if working_degree is None else f"Degree {working_degree} works."


def _splits(recognized: Recognized, degree: int) -> bool:
    try:
        _run_pipeline(Split, recognized, split_over(degree), None)
    except UnsupportedModelError:
        return False
    return True
