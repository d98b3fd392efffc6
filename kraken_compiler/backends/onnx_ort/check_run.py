"""What a device really ran between every reduce's start and its wait: the file's order is a promise, a run is a fact.

ONNX Runtime fuses, reorders and drops nodes, so they are taken from its own profile of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kraken_compiler.backends.onnx_ort.events import Event, RanNode
from kraken_compiler.backends.onnx_ort.format import START, WAIT
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import Window

_ATTENTIONS = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
_PRODUCTS = ("MatMul", "Gemm", "Einsum")


@dataclass(frozen=True)
class RanWindow:
    """One reduce in a run of one device.

    Attributes:
        window: What the file promises.
        start_us: When its start ended, microseconds after the run began.
        products: The matrix products that ran between its start and its wait, in that order.
        attentions: The attentions likewise.
        wait_us: How long the device waited, in microseconds.
    """

    window: Window
    start_us: float
    products: tuple[RanNode, ...]
    attentions: tuple[RanNode, ...]
    wait_us: float

    @property
    def hiding_us(self) -> float:
        """Microseconds of products and attentions that the sum had to hide behind."""
        return sum(node.microseconds for node in (*self.products, *self.attentions))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "start_us": self.start_us,
            "products": [asdict(node) for node in self.products],
            "attentions": [asdict(node) for node in self.attentions],
            "wait_us": self.wait_us,
        }


def is_matrix_product(op: str) -> bool:
    """True for the ops that ONNX Runtime runs matrix products as, with whatever it fused to them."""
    return any(product in op for product in _PRODUCTS)


def ran_windows(events: Sequence[Event], expected: Sequence[Window]) -> tuple[RanWindow, ...]:
    """Measure the window of every reduce in a profiled run.

    Args:
        events: Those of one device.
        expected: The windows of its file, in launch order.

    Raises:
        VerificationError: The run began or awaited other reduces than the file says, or in another order.
    """
    places = {event.name: place for place, event in enumerate(events) if event.kind in (START, WAIT)}
    for kind, names in ((START, [one.start for one in expected]), (WAIT, [one.wait for one in expected])):
        ran = [event.name for event in events if event.kind == kind]
        # Sums may be awaited in another order than they were begun.
        if ran != names if kind == START else sorted(ran) != sorted(names):
            raise VerificationError(f"a device ran the {kind} nodes {', '.join(ran)}; its file has {', '.join(names)}")
    windows = []
    for window in expected:
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


def require_run_overlap(devices: Sequence[Sequence[RanWindow]]) -> None:
    """Make sure that no device ran a promised window without a matrix product.

    Args:
        devices: The windows of every device's run, device 0 first.

    Raises:
        VerificationError: One did; names the devices and the reduces.
    """
    lost = [
        (device, one.window)
        for device, windows in enumerate(devices)
        for one in windows
        if one.window.promised and not one.products
    ]
    if lost:
        places = ", ".join(
            f"reduce {window.reduce} ({window.start} to {window.wait}) on device {device}"
            for device, window in lost[:3]
        )
        reduces = len({window.reduce for _, window in lost})
        raise VerificationError(
            f"{reduces} of {len(devices[0])} reduces lost their overlap in the run: ONNX Runtime executed no matrix "
            f"product between start and wait of {places}"
        )


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)
