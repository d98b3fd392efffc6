"""What really lies between every reduce's start and its wait in the program that will run.

The plan says what should be there; compilers and exporters move nodes, so the emitted graph is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from kraken_compiler._torch_compat import functional_collectives
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir import ops
from kraken_compiler.ir.schedule import FormPlan, Window

_GEMM_PACKETS = frozenset(
    {
        *("aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::einsum"),
        *("aten::scaled_dot_product_attention", "kraken::attention"),
    }
)


def check_schedule(module: fx.GraphModule, plan: FormPlan | None = None) -> tuple[Window, ...]:
    """Measure the window of every reduce, in launch order.

    Args:
        module: A lane graph with `kraken::` collectives, or a rank's graph with real ones.
        plan: Where the promised windows come from; None promises nothing.

    Returns:
        One record per reduce; `gemms` are node names in program order.

    Raises:
        VerificationError: A reduce is never awaited, or there are more or fewer reduces than planned.
    """
    starts, wait_targets = _collective_targets()
    nodes = list(module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    gemms = [node for node in nodes if _is_gemm(node)]
    launched = [node for node in nodes if node.target in starts]
    if plan is not None and len(plan.reduces) != len(launched):
        raise VerificationError(f"the plan has {len(plan.reduces)} reduces, the program {len(launched)}")
    windows = []
    for index, start in enumerate(launched):
        waits = [user for user in start.users if user.target in wait_targets]
        if not waits or len(waits) != len(start.users):
            raise VerificationError(
                f"the handle of reduce {index} (node {start.name}) must go to its wait and only there"
            )
        wait = min(waits, key=position.__getitem__)
        between = tuple(node.name for node in gemms if position[start] < position[node] < position[wait])
        promised = plan.reduces[index].window if plan is not None else ()
        windows.append(Window(index, start.name, wait.name, between, promised))
    return tuple(windows)


def require_overlap(windows: Sequence[Window]) -> None:
    """Make sure that no reduce lost the compute that should hide it.

    Raises:
        VerificationError: A window that the form promises is empty; names the reduces.
    """
    lost = [window for window in windows if window.promised and not window.gemms]
    if lost:
        places = ", ".join(f"reduce {window.reduce} ({window.start} to {window.wait})" for window in lost[:3])
        raise VerificationError(
            f"{len(lost)} of {len(windows)} reduces lost their overlap: no matrix multiplication between start and "
            f"wait of {places}"
        )


def _collective_targets() -> tuple[frozenset[object], frozenset[object]]:
    assert ops is not None  # importing it defines the kraken ops
    starts: set[object] = {torch.ops.kraken.all_reduce_start.default}
    waits: set[object] = {torch.ops.kraken.wait.default}
    if torch.distributed.is_available():
        real = functional_collectives()
        starts.add(real.all_reduce.default)
        waits.add(real.wait_tensor.default)
    return frozenset(starts), frozenset(waits)


def _is_gemm(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _GEMM_PACKETS
