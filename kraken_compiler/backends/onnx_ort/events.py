"""What a run of a device's program did, and when. Imports nothing: whoever checks a run needs it, also without onnx."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RanNode:
    """A node that ONNX Runtime executed, after its own optimizations: it may stand for several nodes of the file.

    Attributes:
        name: Its name; one that ONNX Runtime put together from several says so itself.
        op: Its op type.
        microseconds: How long it took.
    """

    name: str
    op: str
    microseconds: float


@dataclass(frozen=True)
class Event:
    """What a run did, and when.

    Attributes:
        name: A collective's node, or the first node of a stage.
        kind: `format.START`, `WAIT`, `GATHER`, or "stage".
        began, ended: Seconds of the clock `time.perf_counter`.
        nodes: Of a stage, the names of its nodes and their op types, in the order of the file.
        ran: Of a stage of a profiled run, what ONNX Runtime executed, in that order.
    """

    name: str
    kind: str
    began: float
    ended: float
    nodes: tuple[tuple[str, str], ...] = ()
    ran: tuple[RanNode, ...] = ()


def write_events(events: Iterable[Event], path: Path) -> None:
    """Write the events of a run to a JSON file."""
    path.write_text(json.dumps([asdict(event) for event in events]), encoding="utf-8")


def read_events(path: Path) -> tuple[Event, ...]:
    """Read what `write_events` wrote."""
    return tuple(_event(**record) for record in json.loads(path.read_text(encoding="utf-8")))


def _event(
    name: str, kind: str, began: float, ended: float, nodes: list[tuple[str, str]], ran: list[dict[str, object]]
) -> Event:
    executed = tuple(RanNode(**node) for node in ran)  # type: ignore[arg-type]
    return Event(name, kind, began, ended, tuple((name, op) for name, op in nodes), executed)
