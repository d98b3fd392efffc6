"""What ranks compute and what they have on their way, with times, in the format of Chrome's and Perfetto's traces.

Every rank is a process of the trace with two streams: `compute`, on which its program runs, begins sums and waits for
them, and `link`, on which a sum is from its start to the end of its wait. Imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

RUN, COMPUTE, LINK = STREAMS = ("runs", "compute", "link")
PREFILL, STEP = RUNS = ("prefill", "step")

_MOST_RUNS = 64
"""Later runs are not recorded: a trace is looked at, and a viewer has to hold it."""


@dataclass(frozen=True)
class Span:
    """Something that takes a stream.

    Attributes:
        name: What it is.
        stream: One of `STREAMS`.
        begin, end: Seconds since all ranks began.
    """

    name: str
    stream: str
    begin: float
    end: float


class Trace:
    """One rank's record.

    Attributes:
        spans: What it has recorded.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._zero = time.perf_counter()
        self._runs = 0
        self._since: float | None = None
        self._reduce = 0
        self._in_flight: dict[int, tuple[str, float]] = {}

    def begin(self) -> None:
        """Count time from now; to be called where all ranks have just met."""
        self._zero = time.perf_counter()

    def watch(self, sums: Any) -> None:
        """Record an object's `start`, `wait` and `all_gather`, those of `MessageSums`."""
        start, wait, gather = sums.start, sums.wait, sums.all_gather

        def noted_start(x: Any) -> Any:
            name = f"reduce {self._reduce}"
            self._reduce += 1
            handle, began, _ = self._timed(f"start {name}", lambda: start(x))
            self._in_flight[id(handle)] = (name, began)
            return handle

        def noted_wait(handle: Any) -> Any:
            name, began = self._in_flight.pop(id(handle))
            total, _, ended = self._timed(f"wait {name}", lambda: wait(handle))
            self._note(name, LINK, began, ended)
            return total

        def noted_gather(x: Any, dim: int) -> Any:
            whole, began, ended = self._timed("gather", lambda: gather(x, dim))
            self._note("gather", LINK, began, ended)
            return whole

        for name, noted in (("start", noted_start), ("wait", noted_wait), ("all_gather", noted_gather)):
            setattr(sums, name, noted)

    def name_runs(self, decoder: Any) -> None:
        """Record an object's `prefill` and `step`, those of a `Decoder`, as runs."""
        for name in RUNS:
            setattr(decoder, name, self._run(name, getattr(decoder, name)))

    def _run(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            if self._runs >= _MOST_RUNS:
                return act(*args, **options)
            self._runs += 1
            self._reduce = 0
            began = self._since = time.perf_counter()
            try:
                return act(*args, **options)
            finally:
                ended = time.perf_counter()
                self._note("compute", COMPUTE, self._since, ended)
                self._note(name, RUN, began, ended)
                self._since = None

        return noted

    def _timed(self, name: str, act: Callable[[], Any]) -> tuple[Any, float, float]:
        """Do something on the compute stream; gives its result, its beginning and its end."""
        began = time.perf_counter()
        result = act()
        ended = time.perf_counter()
        if self._since is not None:
            self._note("compute", COMPUTE, self._since, began)
            self._note(name, COMPUTE, began, ended)
            self._since = ended
        return result, began, ended

    def _note(self, name: str, stream: str, began: float, ended: float) -> None:
        if self._since is not None:
            self.spans.append(Span(name, stream, began - self._zero, ended - self._zero))

    def to_json(self) -> bytes:
        """The record, for `spans_from`."""
        return json.dumps([asdict(span) for span in self.spans]).encode()


def spans_from(content: bytes) -> list[Span]:
    """The record that `Trace.to_json` wrote."""
    return [Span(**span) for span in json.loads(content)]


def spans_of_chrome(trace: Mapping[str, Any], rank: int) -> list[Span]:
    """One rank's record from a trace that `chrome_trace` made.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is none.
    """
    return [
        Span(event["name"], STREAMS[event["tid"]], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in trace["traceEvents"]
        if event["ph"] == "X" and event["pid"] == rank
    ]


def chrome_trace(of_ranks: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """All ranks' records as a trace that chrome://tracing and ui.perfetto.dev open; times are in microseconds."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(of_ranks):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        for number, stream in enumerate(STREAMS):
            place = {"ph": "M", "pid": rank, "tid": number}
            events.append({"name": "thread_name", **place, "args": {"name": stream}})
        events += [
            {
                "name": span.name,
                "ph": "X",
                "pid": rank,
                "tid": STREAMS.index(span.stream),
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
            }
            for span in spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
