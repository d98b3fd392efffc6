"""Windows of a graph: the operations that lie between every reduce's start and its wait.

The plan says what should lie there; passes, compilers and exporters move nodes, so a graph is measured, not trusted.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from kraken_compiler._torch_compat import OpOverload, op_name
from kraken_compiler.ir.schedule import FormPlan, Window
from kraken_compiler.ops import collectives as ops

_GEMMS = frozenset(
    {
        *("aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::einsum"),
        *("aten::scaled_dot_product_attention", "kraken::attention", "kraken::cached_attention"),
        *("kraken::capped_attention", "kraken::engine_attention", "kraken::expert_linear", "kraken_rank::linear"),
    }
)


def is_gemm(node: fx.Node) -> bool:
    """True for the operations long enough to hide a collective behind: matrix products and attentions."""
    return isinstance(node.target, OpOverload) and op_name(node.target) in _GEMMS


def measure_windows(
    graph: fx.Graph,
    plan: FormPlan | None = None,
    *,
    more_starts: Collection[object] = (),
    more_waits: Collection[object] = (),
) -> tuple[Window, ...]:
    """Measure the window of every reduce, in launch order.

    Args:
        graph: A lane graph.
        plan: Where the promised windows come from; None promises nothing.
        more_starts, more_waits: Targets that start and await a reduce, besides the `kraken::` ops.

    Returns:
        One record per reduce; `gemms` are node names in program order.

    Raises:
        ValueError: A reduce's handle does not go to its wait and only there, or there are more or fewer reduces than
            planned.
    """
    assert ops is not None  # importing it defines the kraken ops
    starts = {torch.ops.kraken.all_reduce_start.default, *more_starts}
    waits = {torch.ops.kraken.wait.default, *more_waits}
    place = {node: number for number, node in enumerate(graph.nodes)}
    gemms = [node for node in graph.nodes if is_gemm(node)]
    launches = [node for node in graph.nodes if node.target in starts]
    if plan is not None and len(plan.reduces) != len(launches):
        raise ValueError(f"the plan has {len(plan.reduces)} reduces, the program {len(launches)}")
    windows = []
    for index, start in enumerate(launches):
        wait_nodes = [user for user in start.users if user.target in waits]
        if not wait_nodes or len(wait_nodes) != len(start.users):
            raise ValueError(f"the handle of reduce {index} (node {start.name}) must go to its wait and only there")
        wait = min(wait_nodes, key=place.__getitem__)
        window_gemms = tuple(node.name for node in gemms if place[start] < place[node] < place[wait])
        branches = plan.reduces[index].window if plan is not None else ()
        windows.append(Window(index, start.name, wait.name, window_gemms, branches))
    return tuple(windows)
