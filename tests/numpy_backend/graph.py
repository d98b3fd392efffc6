"""A lane graph as plain values. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from kraken_compiler.errors import InputFileError, VerificationError
from kraken_compiler.ir.schedule import FormPlan, Window

GRAPH_FILE = "numpy.json"
START, WAIT = "kraken::all_reduce_start", "kraken::wait"
PRODUCTS = ("aten::linear", "aten::scaled_dot_product_attention")


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        name: Its own.
        op: The operator's name.
        args: Its operands; another node's value is `{"node": NAME}`.
    """

    name: str
    op: str
    args: list[Any]


@dataclass(frozen=True)
class LaneGraph:
    """The graph of every lane.

    Attributes:
        nodes: In the order of running.
        outputs: Names of the nodes whose values it gives.
    """

    nodes: list[Node]
    outputs: list[str]

    def save(self, path: Path, indent: int) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=indent or None), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputFileError: It is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls([Node(**node) for node in content["nodes"]], content["outputs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputFileError(f"{path}: damaged, no graph ({type(error).__name__})") from error

    def windows(self, plan: FormPlan | None) -> tuple[Window, ...]:
        """What lies between every reduce's start and its wait.

        Raises:
            VerificationError: A reduce is never awaited, or there are more or fewer than planned.
        """
        starts = [number for number, node in enumerate(self.nodes) if node.op == START]
        if plan is not None and len(plan.reduces) != len(starts):
            raise VerificationError(f"the plan has {len(plan.reduces)} reduces, the graph {len(starts)}")
        return tuple(self._window(reduce, start, plan) for reduce, start in enumerate(starts))

    def _window(self, reduce: int, start: int, plan: FormPlan | None) -> Window:
        handle = {"node": self.nodes[start].name}
        waits: Sequence[int] = [
            number for number, node in enumerate(self.nodes) if node.op == WAIT and node.args[0] == handle
        ]
        if len(waits) != 1:
            raise VerificationError(f"reduce {reduce} is awaited {len(waits)} times")
        between = self.nodes[start + 1 : waits[0]]
        products = tuple(node.name for node in between if node.op in PRODUCTS)
        promised = plan.reduces[reduce].window if plan is not None else ()
        return Window(reduce, self.nodes[start].name, self.nodes[waits[0]].name, products, promised)
