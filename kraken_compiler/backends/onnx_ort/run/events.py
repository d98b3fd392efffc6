"""The events of a run of a device's program, with their times. Whoever checks a run needs them, also without onnx."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kraken_compiler.ir.schedule import RanNode


@dataclass(frozen=True)
class Event:
    """A stage or a collective of a run, with its times.

    Attributes:
        name: A collective's node, or the first node of a stage.
        kind: `format.START`, `WAIT`, `GATHER`, or "stage".
        began, ended: Seconds of the clock `time.perf_counter`.
        nodes: Of a stage, the names of its nodes and their op types, in the order of the file.
        ran: Of a stage of a profiled run, what ONNX Runtime executed, in that order.
        part: Which part of the tokens it was for.
    """

    name: str
    kind: str
    began: float
    ended: float
    nodes: tuple[tuple[str, str], ...] = ()
    ran: tuple[RanNode, ...] = ()
    part: int = 0


def events_from(records: Iterable[dict[str, Any]]) -> tuple[Event, ...]:
    """The events of a run, from what `dataclasses.asdict` made of them."""
    return tuple(_event(**record) for record in records)


def _event(
    name: str,
    kind: str,
    began: float,
    ended: float,
    nodes: list[tuple[str, str]],
    ran: list[dict[str, object]],
    part: int,
) -> Event:
    executed = tuple(RanNode(**node) for node in ran)  # type: ignore[arg-type]
    return Event(name, kind, began, ended, tuple((name, op) for name, op in nodes), executed, part)
