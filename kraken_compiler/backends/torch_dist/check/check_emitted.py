"""The windows between every reduce's start and its wait in the code that torch.compile wrote.

Compilers move nodes, so the order that counts is the order of the calls in the generated wrapper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import Window

_SOURCES = re.compile(r"# Topologically Sorted Source Nodes: \[([^\]]*)\]")
_RENAMING = re.compile(r"^(\w+) = (?:reinterpret_tensor\()?(\w+)\b(?!\.|\()")
_FIRST = r"\.default\((?:reinterpret_tensor\()?(\w+)"
_START = re.compile(r"^(?:(\w+) = )?torch\.ops\.(?:kraken_rank\.start|_c10d_functional\.all_reduce_?)" + _FIRST)
_WAIT = re.compile(r"torch\.ops\.(?:kraken_rank\.wait|_c10d_functional\.wait_tensor)" + _FIRST)
_GEMM = re.compile(
    r"extern_kernels\.\w*mm\w*\(|torch\.ops\.(?:kraken_rank\.linear|mkldnn\._linear_pointwise|mkl\._mkl_linear|"
    r"aten\.\w*(?:mm|linear)|aten\._scaled_dot_product\w*|kraken\.(?:(?:cached_)?attention|expert_linear))\b|"
    r"(?:triton_tem|cpp)_fused_\w*mm_\w*(?:\.run)?\("
)


@dataclass(frozen=True)
class _Call:
    """A start, a wait or a matrix product in the code.

    Attributes:
        kind: "start", "wait" or "gemm".
        name: Which graph node it stands for, "" if the code does not say.
        reduce: The number of the reduce that it starts or awaits.
    """

    kind: str
    name: str
    reduce: int = -1


def emitted_windows(code: str, graph_windows: Sequence[Window]) -> tuple[Window, ...]:
    """Measure the window of every reduce in generated code.

    Args:
        code: A module that torch.compile wrote.
        graph_windows: The windows of the graph that was compiled, in launch order.

    Returns:
        The windows with the calls that are really between start and wait, by the name of their graph node.

    Raises:
        VerificationError: The code starts or awaits more, fewer or other reduces than the graph, or in another order,
            which would mix up the sums of ranks.
    """
    calls = _calls(code)
    starts = [place for place, call in enumerate(calls) if call.kind == "start"]
    waits = {call.reduce: place for place, call in reversed(list(enumerate(calls))) if call.kind == "wait"}
    if len(starts) != len(graph_windows) or len(waits) != len(graph_windows):
        raise VerificationError(
            f"the compiled program starts {len(starts)} reduces and awaits {len(waits)}; "
            f"the graph has {len(graph_windows)}"
        )
    names = [calls[place].name for place in starts]
    planned_names = [window.start for window in graph_windows]
    if names != planned_names and set(names) == set(planned_names):
        first = next(number for number, (name, plan) in enumerate(zip(names, planned_names)) if name != plan)
        raise VerificationError(
            f"the compiler changed the order of the reduces: {names[first]} starts where {planned_names[first]} should"
        )
    return tuple(
        Window(
            window.reduce,
            window.start,
            window.wait,
            tuple(call.name for call in calls[starts[number] : waits[number]] if call.kind == "gemm"),
            window.promised,
        )
        for number, window in enumerate(graph_windows)
    )


def require_emitted_overlap(code: str, graph_windows: Sequence[Window]) -> tuple[Window, ...]:
    """Make sure that compiling lost no overlap; returns the windows of the generated code.

    Raises:
        VerificationError: A window that the form promises is empty; says what moved across what.
    """
    windows = emitted_windows(code, graph_windows)
    losses = [number for number, window in enumerate(windows) if window.promised and not window.gemms]
    if losses:
        place = {call.name: position for position, call in enumerate(_calls(code)) if call.name}
        reasons = [_describe_moves(graph_windows[number], place) for number in losses[:3]]
        raise VerificationError(
            f"{len(losses)} of {len(windows)} reduces lost their overlap when the graph was compiled: "
            + "; ".join(reasons)
        )
    return windows


def _describe_moves(window: Window, place: Mapping[str, int]) -> str:
    start, wait = place.get(window.start), place.get(window.wait)
    gemms = [name for name in window.gemms if name in place]
    moves = []
    if start is not None:
        crossings = [name for name in gemms if place[name] < start]
        moves += [f"its start {window.start} was moved down behind {crossings[-1]}"] if crossings else []
    if wait is not None:
        crossings = [name for name in gemms if place[name] > wait]
        moves += [f"its wait {window.wait} was moved up before {crossings[0]}"] if crossings else []
    return f"reduce {window.reduce}: {' and '.join(moves) or 'no matrix product is left between start and wait'}"


def _calls(code: str) -> list[_Call]:
    calls: list[_Call] = []
    reduces: dict[str, int] = {}
    origins: dict[str, str] = {}
    name = ""
    for text in _statements(code):
        sources = _SOURCES.match(text)
        if sources:
            # The last of the nodes that became one call is the one whose result it is.
            name = sources[1].split(",")[-1].strip()
        elif start := _START.match(text):
            number = len(reduces)
            # Our start gives a new tensor, which is awaited; a group's all_reduce works in place.
            reduces[f"{number}"] = number
            origins[start[1] or _origin(origins, start[2])] = f"{number}"
            calls.append(_Call("start", name, number))
            name = ""
        elif wait := _WAIT.search(text):
            origin = _origin(origins, wait[1])
            if origin in reduces:  # gathers are awaited too
                calls.append(_Call("wait", name, reduces[origin]))
            name = ""
        elif _GEMM.search(text):
            calls.append(_Call("gemm", name))
            name = ""
        elif rename := _RENAMING.match(text):
            origins[rename[1]] = _origin(origins, rename[2])
    return calls


def _statements(code: str) -> Iterator[str]:
    """The lines of the function `call` that run, in order."""
    for line in code.partition("def call(")[2].splitlines():
        text = line.strip()
        if text.startswith("return "):
            return
        yield text


def _origin(origins: Mapping[str, str], name: str) -> str:
    while origins.get(name, name) != name:
        name = origins[name]
    return name
