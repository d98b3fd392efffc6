"""Running the graphs of a lane: what is computed once, results on the host, and the order that compilers must keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.backends.sequences import Array
from kraken_compiler.errors import UsageError
from kraken_compiler.ops.devices import retarget

KEEP_THE_ORDER: dict[str, Any] = {
    # Each of these moves starts down to their waits, or waits up to their starts, to free memory sooner.
    "reorder_for_peak_memory": False,
    "reorder_for_locality": False,
}
"""Settings of Inductor, under which compiled code keeps the order that was planned."""


def on_host(values: Tensor) -> Array:
    """A tensor's values as a numpy array; numpy knows no bfloat16, which comes as float32."""
    array: Array = (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    return array


def run_tables(
    tables: fx.GraphModule, weights: Sequence[Tensor], capacity: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Compute what is computed once for a capacity.

    Args:
        tables: The graph: weights, then token ids of any value. It is moved to the device.
        weights: What it reads, in its order, on the device.
        capacity: The longest sequence that it is for.
        device: Where to compute.

    Raises:
        UsageError: The model's positions do not reach that far.
    """
    retarget(tables, device)
    ids = torch.zeros(1, capacity, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            values: tuple[Tensor, ...] = tables(*weights, ids)
    except (IndexError, RuntimeError) as error:
        # Stored position tables end somewhere, and only running into it shows where.
        raise UsageError(f"the model's positions do not reach {capacity} tokens: {error}") from error
    return values
