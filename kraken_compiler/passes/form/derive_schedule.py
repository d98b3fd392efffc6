"""Derivation of reads, reduces, starts and waits from forms: the arithmetic of the forms table, without a graph.

Legend: a *point* m means "after m branches have contributed"; branch k runs after k - 1 others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from kraken_compiler.ir.forms import Form
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.schedule import FormPlan, Read, Reduce

_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def derive_plan(branches: Sequence[Branch], forms: Sequence[Form], bytes_per_token: int = 0) -> FormPlan:
    """Derive what every branch reads, which partial outputs share a reduce, and when reduces start and are awaited.

    A read never looks further than the source model's own read does, so branches that are parallel in the source stay
    parallel in a form with own lag 1; nor does it look back beyond the beginning of its stream. Partial outputs share a
    reduce when no read needs the sum between them. A reduce starts as soon as its last operand exists and is awaited at
    the first read that needs it.

    Args:
        branches: All branches of the model in execution order.
        forms: One form per layer.
        bytes_per_token: Bytes of one branch's output per token.

    Returns:
        The plan; `plan.reads[k - 1]` belongs to branch k.
    """
    slots = _slots(branches)
    reads = tuple(_read(branch, forms[branch.layer], slots) for branch in branches)
    total = len(branches)
    read_points = sorted({read.peers for read in reads} | {total})
    points = [point for point in read_points if point > 0]
    reduces = []
    for index, last in enumerate(points):
        first = points[index - 1] + 1 if index else 1
        awaited_by = next((read.branch for read in reads if read.peers >= last), None)
        stop = awaited_by if awaited_by is not None else total + 1
        payload = bytes_per_token * len(sums_of(branches, first, last))
        reduces.append(Reduce(index, first, last, awaited_by, tuple(range(last + 1, stop)), payload))
    return FormPlan(tuple(form.name for form in forms), reads, tuple(reduces))


def with_lookups(plan: FormPlan, lookups: Sequence[Reduce]) -> FormPlan:
    """The plan with the reduces of embeddings, which come before all others and have nothing to hide behind."""
    reduces = (*lookups, *plan.reduces)
    return replace(plan, reduces=tuple(replace(one, index=index) for index, one in enumerate(reduces)))


def sums_of(branches: Sequence[Branch], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Groups of the branches first..last (1-based, inclusive) whose outputs may be summed before they join the stream.

    Neighbours that are only added share one sum. A norm needs its operand's sum apart from all others.

    Returns:
        The sums in order, each as its first and last branch.
    """
    sums: list[tuple[int, int]] = []
    for number in range(first, last + 1):
        before, branch = branches[number - 2] if number > first else None, branches[number - 1]
        if before is None or before.post or before.after or branch.post:
            sums.append((number, number))
        else:
            sums[-1] = (sums[-1][0], number)
    return tuple(sums)


def _slots(branches: Sequence[Branch]) -> list[int]:
    """The points between which lags count: 0 and the end of every slot.

    FFNs side by side (routed and shared experts) fill one slot, so that all of them read the same.
    """
    ends = [0]
    for branch in branches:
        before = branches[branch.index - 2] if branch.index > 1 else None
        same = before is not None and (before.layer, before.kind, before.reads) == (
            branch.layer,
            branch.kind,
            branch.reads,
        )
        if same and branch.kind == "ffn":
            ends[-1] = branch.index
        else:
            ends.append(branch.index)
    return ends


def _read(branch: Branch, form: Form, slots: list[int]) -> Read:
    lag = form.lag(branch.kind)
    slot = next(number for number, end in enumerate(slots) if end >= branch.index)
    points = (slots[max(0, slot - steps)] for steps in (lag.own, lag.peers))
    own, peers = (max(branch.base, min(point, branch.reads)) for point in points)
    return Read(branch.index, own, peers)


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Read a layer selection such as `15-29`, `-15--1`, `0,2,5-7`; negative numbers count from the end.

    Args:
        text: The selection.
        count: Number of layers in the model.

    Raises:
        ValueError: The text is no selection, or names a layer the model does not have.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"'{part.strip()}' is no layer or range of layers; write e.g. 15-29, -4--1 or 0,2,5-7")
        first, last = (_resolve(number, count) for number in (match[1], match[2] or match[1]))
        if first > last:
            raise ValueError(f"the layer range '{part.strip()}' is empty")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _resolve(number: str, count: int) -> int:
    layer = int(number)
    if not -count <= layer < count:
        raise ValueError(f"the model has layers 0 to {count - 1}, there is no layer {layer}")
    return layer % count
