"""The windows between every reduce's start and its wait in an ONNX graph, whose order is the order of running."""

from __future__ import annotations

import onnx_ir

from kraken_compiler.backends.onnx_ort.format import DOMAIN, START, WAIT
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import FormPlan, Window

_GEMMS = frozenset({"MatMul", "Gemm", "Attention", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul"})


def is_gemm(node: onnx_ir.Node) -> bool:
    """True for the operations long enough to hide a collective behind: matrix products and attentions."""
    return node.op_type in _GEMMS


def measure_windows(graph: onnx_ir.Graph, plan: FormPlan | None = None) -> tuple[Window, ...]:
    """Measure the window of every reduce, in launch order.

    Args:
        graph: A device's graph.
        plan: Where the promised windows come from; None promises nothing.

    Raises:
        VerificationError: A reduce is never awaited or twice, or there are more or fewer reduces than planned.
    """
    nodes = list(graph)
    place = {node: number for number, node in enumerate(nodes)}
    starts = [node for node in nodes if node.domain == DOMAIN and node.op_type == START]
    if plan is not None and len(plan.reduces) != len(starts):
        raise VerificationError(f"the plan has {len(plan.reduces)} reduces, the ONNX graph {len(starts)}")
    windows = []
    for number, start in enumerate(starts):
        users = [use.node for use in start.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != WAIT:
            raise VerificationError(f"the handle of reduce {number} (node {start.name}) must go to its wait, once")
        between = nodes[place[start] + 1 : place[users[0]]]
        gemms = tuple(_name(node) for node in between if is_gemm(node))
        promised = plan.reduces[number].window if plan is not None else ()
        windows.append(Window(number, _name(start), _name(users[0]), gemms, promised))
    return tuple(windows)


def _name(node: onnx_ir.Node) -> str:
    return node.name or str(node.outputs[0].name)
