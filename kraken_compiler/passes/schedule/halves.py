"""What the passes have in common that run two halves in turns behind every start of a reduce."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import fx

from kraken_compiler.ir.schedule import FormPlan, Reduce
from kraken_compiler.ir.windows import is_gemm

_START = torch.ops.kraken.all_reduce_start.default


@dataclass(frozen=True)
class Turns:
    """What the halves have between the starts of a graph's reduces.

    Attributes:
        once: Numbers of the reduces that they have together.
        with_products: Numbers of the reduces before whose start each of them has matrix products.
    """

    once: tuple[int, ...]
    with_products: tuple[int, ...]


def segments_of(calls: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Nodes in order, cut behind every start of a reduce."""
    segments: list[list[fx.Node]] = [[]]
    for node in calls:
        segments[-1].append(node)
        if node.target is _START:
            segments.append([])
    return segments


def turns_of(
    segments: Sequence[Sequence[fx.Node]], halved: AbstractSet[fx.Node], joined: AbstractSet[fx.Node]
) -> Turns:
    """The turns of a graph.

    Args:
        segments: Its nodes, see `segments_of`.
        halved: Those that each half has.
        joined: Those that they have together.
    """
    with_start = list(enumerate(segments[:-1]))
    return Turns(
        tuple(number for number, segment in with_start if segment[-1] in joined),
        tuple(number for number, segment in with_start if any(is_gemm(node) for node in segment if node in halved)),
    )


def plan_of_both(plan: FormPlan, turns: Turns) -> FormPlan:
    """The plan of both halves: A's reduces hide behind B's share of the same branch, B's behind A's next one."""
    reduces: list[Reduce] = []
    for reduce, following in zip(plan.reduces, [*plan.reduces[1:], None]):
        is_followed = following is not None and following.index in turns.with_products
        behind_next = (following.last,) if following is not None and is_followed else ()
        for others in ((),) if reduce.index in turns.once else ((reduce.last,), behind_next):
            window = tuple(dict.fromkeys((*others, *reduce.window)))
            reduces.append(replace(reduce, index=len(reduces), window=window))
    return replace(plan, reduces=tuple(reduces))
