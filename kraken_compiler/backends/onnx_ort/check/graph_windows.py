"""The windows between every reduce's start and its wait in an ONNX graph, whose order is the order of running."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir

from kraken_compiler.artifact.manifest import SplitRecord
from kraken_compiler.backends.onnx_ort.format import DOMAIN, FUSED_PRODUCT, START, WAIT
from kraken_compiler.backends.onnx_ort.run.cut_model import Collective, Stage, Step, cut, turns
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import FormPlan, Window

_GEMMS = frozenset({"MatMul", "Gemm", "Attention", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul"})
_PRODUCTS = _GEMMS | {FUSED_PRODUCT}


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


def measure_halves(model: onnx.ModelProto, record: SplitRecord) -> tuple[Window, ...]:
    """Measure the windows of a prefill that the runtime reads as two halves, in launch order.

    Args:
        model: A device's model.
        record: The reduces of both halves. Those that the first half need not add up are left out, and whose window
            they would be in has no promise.
    """
    steps = cut(model)
    sequence = turns(steps, [value.name for value in model.graph.output])
    return _windows_of_both(steps, [(turn.earlier, turn.last) for turn in sequence], record.plan, record.once)


def measure_rows(model: onnx.ModelProto, plan: FormPlan) -> tuple[Window, ...]:
    """Measure the windows of a batch whose rows the runtime runs as two halves, in launch order.

    Args:
        model: A device's model.
        plan: The reduces of both halves.
    """
    steps = cut(model)
    return _windows_of_both(steps, [(turn.last, turn.last) for turn in turns(steps, ())], plan)


def _windows_of_both(
    steps: Sequence[Step], sequence: Sequence[tuple[Sequence[int], ...]], plan: FormPlan, once: Sequence[int] = ()
) -> tuple[Window, ...]:
    """The windows of two halves that run in turns.

    Args:
        steps: The model's.
        sequence: For every turn, the numbers of the steps that each half runs.
        plan: The reduces of both halves.
        once: Numbers of the model's reduces that the halves have together, and not one each.
    """
    promised_windows = iter(reduce.window for reduce in plan.reduces)
    order: list[tuple[int, Step]] = []
    promises: dict[tuple[int, str], tuple[int, ...]] = {}
    for number, of_halves in enumerate(sequence):
        following = sequence[number + 1][0] if number + 1 < len(sequence) else ()
        for part, numbers in enumerate(of_halves):
            order += [(part, steps[one]) for one in numbers]
            if number + 1 < len(sequence) and (part == 1 or number not in once):
                promised, start = next(promised_windows), steps[of_halves[1][-1]]
                assert isinstance(start, Collective)
                is_followed = any(isinstance(steps[one], Stage) for one in following)
                promises[part, start.result] = promised if part == 0 or number in once or is_followed else ()
    windows: list[Window] = []
    for place, (part, step) in enumerate(order):
        if isinstance(step, Collective) and step.kind == START:
            wait_place, wait = next(
                (later, other)
                for later, (its_part, other) in enumerate(order)
                if its_part == part and isinstance(other, Collective) and other.operand == step.result
            )
            between = (other for _, other in order[place + 1 : wait_place] if isinstance(other, Stage))
            gemms = [node.name for stage in between for node in stage.model.graph.node if node.op_type in _PRODUCTS]
            windows.append(Window(len(windows), step.name, wait.name, tuple(gemms), promises[part, step.result]))
    return tuple(windows)


def _name(node: onnx_ir.Node) -> str:
    return node.name or str(node.outputs[0].name)
