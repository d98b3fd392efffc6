"""The windows of a run, between every reduce's start and its wait: the file's order is a promise, a run is a fact.

ONNX Runtime fuses, reorders and drops nodes, so they are taken from its own profile of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

from kraken_compiler.backends.onnx_ort.format import START, WAIT
from kraken_compiler.backends.onnx_ort.run.events import Event
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import RanWindow, Window

_ATTENTIONS = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
_PRODUCTS = ("MatMul", "Gemm", "Einsum")


def is_matrix_product(op: str) -> bool:
    """True for the ops that ONNX Runtime runs matrix products as, with whatever it fused to them."""
    return any(product in op for product in _PRODUCTS)


def ran_windows(events: Sequence[Event], file_windows: Sequence[Window]) -> tuple[RanWindow, ...]:
    """Measure the window of every reduce in a profiled run.

    Args:
        events: Those of one device.
        file_windows: The windows of its file, in launch order.

    Raises:
        VerificationError: The run began or awaited other reduces than the file says, or in another order.
    """
    places = {event.name: place for place, event in enumerate(events) if event.kind in (START, WAIT)}
    for kind, names in ((START, [one.start for one in file_windows]), (WAIT, [one.wait for one in file_windows])):
        event_names = [event.name for event in events if event.kind == kind]
        # Sums may be awaited in another order than they were begun.
        if event_names != names if kind == START else sorted(event_names) != sorted(names):
            raise VerificationError(
                f"a device ran the {kind} nodes {', '.join(event_names)}; its file has {', '.join(names)}"
            )
    windows = []
    for window in file_windows:
        start, wait = places[window.start], places[window.wait]
        between = [node for event in events[start + 1 : wait] for node in event.ran]
        windows.append(
            RanWindow(
                window,
                _microseconds(events[start].ended - events[0].began),
                tuple(node for node in between if is_matrix_product(node.op)),
                tuple(node for node in between if node.op in _ATTENTIONS),
                _microseconds(events[wait].ended - events[wait].began),
            )
        )
    return tuple(windows)


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)
