"""What the passes have in common that run two halves in turns behind every start of a reduce."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
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


class HalvesBuilder:
    """Builds a graph in which each half has its own copy of what is halved.

    Attributes:
        graph: What is built.
        shared: The copies that the halves have together, by the nodes that they are copies of.
        halves: Those of each half.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.shared: dict[fx.Node, fx.Node] = {}
        self.halves: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})

    def add(self, segment: Sequence[fx.Node], halved: AbstractSet[fx.Node]) -> None:
        """Add nodes in order: the shared ones, then the first half's, then the second's."""
        for node in segment:
            if node not in halved:
                self.copy(node, self.shared, self.shared)
        for half in self.halves:
            for node in segment:
                if node in halved:
                    self.copy(node, ChainMap(half, self.shared), half)

    def copy(self, node: fx.Node, values: Mapping[fx.Node, fx.Node], into: dict[fx.Node, fx.Node]) -> None:
        """Add a node to one of the tables; `values` are the copies of its operands."""
        into[node] = self.graph.node_copy(node, values.__getitem__)
        into[node].meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}


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
    """The plan of both halves: A's reduces hide behind B's share of the same branch, B's behind A's next one.

    Where a share has no products, as the lookup of an embedding has none, it hides nothing.
    """
    reduces: list[Reduce] = []
    for reduce, following in zip(plan.reduces, [*plan.reduces[1:], None]):
        is_followed = following is not None and following.index in turns.with_products
        behind_next = (following.last,) if following is not None and is_followed else ()
        behind_same = (reduce.last,) if reduce.index in turns.with_products else ()
        for others in ((),) if reduce.index in turns.once else (behind_same, behind_next):
            window = tuple(dict.fromkeys((*others, *reduce.window)))
            reduces.append(replace(reduce, index=len(reduces), window=window))
    return replace(plan, reduces=tuple(reduces))
