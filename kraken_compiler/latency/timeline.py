"""Lays a scheduled graph on a machine's two streams: what the device computes, and what its link carries.

A reduce takes the link from its start on, one after the other. A wait stops the device until the sum has landed. Where
a device itself copies, sends and adds, as CPUs do, it is busy for a part of it at the start and for a part at the wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from kraken_compiler.latency.machine import Machine
from kraken_compiler.latency.node_costs import KINDS, Cost, is_collective, node_costs

_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default

_NOTHING = 1e-9
"""Of a sum of times, what is rounding."""
COMPUTE, LINK = STREAMS = ("compute", "link")


@dataclass(frozen=True)
class Event:
    """Something that takes a stream.

    Attributes:
        name: The node, or the reduce.
        stream: One of `STREAMS`.
        kind: What it is: one of the kinds of compute, "launch", "reduce", "busy" or "wait".
        begin, end: Seconds from the beginning of the run.
    """

    name: str
    stream: str
    kind: str
    begin: float
    end: float


@dataclass
class Timeline:
    """A run of a program.

    Attributes:
        seconds: Until its result is there.
        spent: Seconds of the device by what they go to: the kinds of compute, "launches", and "reduces" that it takes
            part in.
        waited: Seconds in which the device waits for sums.
        carried: Seconds in which the link carries sums.
        events: All of it, in order.
        notes: What a user should know of these times, each once.
    """

    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0
    carried: float = 0.0
    events: list[Event] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain values, in seconds; without the events."""
        return {"seconds": self.seconds, "spent": self.spent, "waited": self.waited, "hidden": self.hidden}

    @property
    def hidden(self) -> float:
        """Seconds of sums on the link that nobody waits for."""
        hidden = self.carried - self.waited
        return hidden if hidden > _NOTHING * self.carried else 0.0


def lay_out(
    graph: fx.Graph,
    sizes: Mapping[fx.Node, Any],
    machine: Machine,
    ranks: int,
    *,
    fused: bool,
    recorded: bool,
    silent: bool = False,
) -> Timeline:
    """The timeline of one run of a graph.

    Args:
        graph: A lane graph with its collectives where they run.
        sizes: The shapes of its values.
        machine: What runs it.
        ranks: How many lanes there are, one a device.
        fused: The program is compiled; see `node_costs`.
        recorded: Its kernels run as one (a CUDA graph, code of a compiler): the host does not begin each by itself.
        silent: Leave all communication out: the time that no schedule can beat.

    Raises:
        UsageError: The machine has no figures for this number of ranks, or for an element type.
    """
    costs = node_costs(graph, sizes, machine, fused=fused)
    builder = _Builder(machine, ranks if not silent else 1, recorded)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _START:
            builder.start(node, sizes[node].bytes)
        elif node.target is _WAIT:
            builder.wait(node)
        elif is_collective(node):
            builder.gather(node, sizes[node].bytes)
        else:
            builder.compute(node.name, costs[node])
    builder.end(machine.launch.step)
    builder.timeline.notes = tuple(dict.fromkeys(cost.note for cost in costs.values() if cost.note))
    return builder.timeline


class _Builder:
    def __init__(self, machine: Machine, ranks: int, recorded: bool) -> None:
        self.table = machine.reduces(ranks) if ranks > 1 else None
        self.launch = machine.launch.compiled if recorded else machine.launch.eager
        self.ahead = machine.launch.ahead and not recorded
        self.now = self.link_free = self.host = 0.0
        self.landing: dict[fx.Node, tuple[float, float]] = {}
        self.timeline = Timeline(spent=dict.fromkeys((*KINDS, "launches", "reduces"), 0.0))

    def compute(self, name: str, cost: Cost) -> None:
        launch = cost.launches * self.launch
        if self.ahead:
            self.host += launch
            self._take(name, "launch", "launches", max(0.0, self.host - self.now) if cost.launches else 0.0)
            launch = 0.0
        self._take(name, cost.kind, cost.kind, cost.seconds)
        self._take(name, "launch", "launches", launch)

    def start(self, node: fx.Node, payload: int) -> None:
        if self.table is None:
            return
        whole, busy = self.table.times(payload)
        self._take(node.name, "busy", "reduces", busy / 2)
        self._carry(node.name, whole - busy)
        self.landing[node] = (self.link_free, busy / 2)

    def wait(self, node: fx.Node) -> None:
        if self.table is None:
            return
        (start,) = node.all_input_nodes
        landed, busy = self.landing[start]
        self._wait_until(node.name, landed)
        self._take(node.name, "busy", "reduces", busy)

    def gather(self, node: fx.Node, payload: int) -> None:
        """Nothing hides a gather: half of an all-reduce, which scatters the sum before it gathers it."""
        if self.table is None:
            return
        whole, busy = (seconds / 2 for seconds in self.table.times(payload))
        self._carry(node.name, whole - busy)
        self._wait_until(node.name, self.link_free)
        self._take(node.name, "busy", "reduces", busy)

    def end(self, step: float) -> None:
        """What a run of the whole program takes besides."""
        self._take("run", "launch", "launches", step)
        self.timeline.seconds = self.now

    def _carry(self, name: str, seconds: float) -> None:
        """Take the link, from now on or from when it is free."""
        begin = max(self.now, self.link_free)
        self.link_free = begin + seconds
        self.timeline.carried += seconds
        self.timeline.events.append(Event(name, LINK, "reduce", begin, self.link_free))

    def _wait_until(self, name: str, landed: float) -> None:
        if landed > self.now:
            self.timeline.waited += landed - self.now
            self.timeline.events.append(Event(name, COMPUTE, "wait", self.now, landed))
            self.now = landed

    def _take(self, name: str, kind: str, account: str, seconds: float) -> None:
        if seconds:
            self.timeline.events.append(Event(name, COMPUTE, kind, self.now, self.now + seconds))
            self.timeline.spent[account] += seconds
            self.now += seconds
