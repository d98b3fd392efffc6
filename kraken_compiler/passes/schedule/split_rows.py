"""Run the rows of a batch as two halves, so that each half's reduces fly while the other half computes.

The whole lane graph is there twice, on the first rows and on the others, in turns behind every start; weights and what
follows from them alone are shared. Tokens may meet anywhere, as long as rows do not: encoders and encoder-decoders,
which have no KV cache, can be cut so. With a cache it serves runs on whole batches; prefills are cut along their tokens
(`split_tokens.py`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from kraken_compiler._torch_compat import OpOverload, op_name
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import LaneProgram, Program, SplitRun
from kraken_compiler.ir.rows import RowDims
from kraken_compiler.ir.size_checks import BATCH
from kraken_compiler.ir.size_rules import names_in
from kraken_compiler.ops.op_sets import ATTENTIONS
from kraken_compiler.passes.cache.mixing import mixes
from kraken_compiler.passes.choosing import UNTAGGED_POINTWISE
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, descendants, module_path
from kraken_compiler.passes.sample_inputs import all_sizes
from kraken_compiler.passes.schedule.halves import HalvesBuilder, plan_of_both, segments_of, turns_of
from kraken_compiler.passes.shapes import (
    is_tensor,
    is_tensor_or_tuple,
    numbers_about,
    same_size,
    shape_of,
    symbols_of,
)

_LENGTHS = (1, 2, 4, 8, 16, 32, 64)
_MOST_ROWS = 8


@dataclass(frozen=True)
class SplitRows(Pass[LaneProgram]):
    name: ClassVar[str] = "split-rows"
    requires: ClassVar[type[Program]] = LaneProgram

    def run(self, program: LaneProgram) -> PassResult:
        if program.rows is not None or not program.plan.reduces:
            return PassResult()
        outcome = _split(program)
        if isinstance(outcome, Rejection):
            return PassResult(program=replace(program, no_rows=str(outcome)))
        return PassResult(len(outcome.plan.reduces), program=replace(program, rows=outcome))


def _split(program: LaneProgram) -> SplitRun | Rejection:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = tuple(spec.shape.index(BATCH) if BATCH in spec.shape else None for spec in program.inputs)
    with_rows = [spec for spec, dim in zip(program.inputs, inputs) if dim is not None]
    if not with_rows:
        return Rejection("none of its inputs has rows")
    if any(BATCH in names_in(rule) for rule in program.call.sizes) and not _suits_any_rows(program):
        return Rejection("not every number of rows suits it")
    first = with_rows[0]
    rows = shape_of(placeholders[first.name])[first.shape.index(BATCH)]
    on_rows = descendants([placeholders[spec.name] for spec in with_rows])
    (results,) = args_of(program.graph.output_node())
    outputs = [_rows_dim(result, rows) if result in on_rows else None for result in results]
    unclear = next((result for result, dim in zip(results, outputs) if result in on_rows and dim is None), None)
    if unclear is not None:
        return Rejection("one of its outputs has no dim of rows alone", (unclear.name,), module_path(unclear))
    # With a cache, the numbers of every mask are known to follow from positions alone, however they are computed.
    counted = on_rows if program.cached is None else on_rows & _beside_masks(program.graph)
    for node in program.graph.nodes:
        reason = _mixes_rows(node, rows) if node in counted and node.op == "call_function" else ""
        if reason:
            return Rejection(reason, (node.name,), module_path(node))
    return _build(program, on_rows, RowDims(inputs, tuple(outputs)))


def _rows_dim(node: fx.Node, rows: Any) -> int | None:
    dims = [dim for dim, size in enumerate(shape_of(node)) if symbols_of(size) & symbols_of(rows)]
    return dims[0] if len(dims) == 1 and same_size(shape_of(node)[dims[0]], rows) else None


def _repeats(node: fx.Node, is_about_rows: Callable[[Any], bool]) -> str:
    """Why a repetition gives rows that are not alike; "" if it gives every row the same, or each its own."""
    operand, counts = args_of(node)
    numbers = [count.meta["val"] if isinstance(count, fx.Node) else count for count in counts]
    shape = (1,) * (len(counts) - len(shape_of(operand))) + tuple(shape_of(operand))
    is_clear = all(size == 1 for size, number in zip(shape, numbers) if is_about_rows(number))
    is_kept = all(number == 1 for size, number in zip(shape, numbers) if is_about_rows(size))
    return "" if is_clear and is_kept else "aten::repeat may mix rows"


def _suits_any_rows(program: LaneProgram) -> bool:
    """True if its rules allow few rows alike, as those do that only look as if rows mattered; each run asks again."""
    lengths = (length for length in _LENGTHS if all_sizes(program, 2, length) is not None)
    length = next(lengths, None)
    return length is not None and all(all_sizes(program, rows, length) is not None for rows in range(1, _MOST_ROWS + 1))


def _beside_masks(graph: fx.Graph) -> set[fx.Node]:
    """The nodes from which something is computed that is no attention's mask."""
    found: set[fx.Node] = set()
    todo = [graph.output_node()]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            mask = argument(node, 3, "attn_mask") if node.target in ATTENTIONS else None
            todo += [operand for operand in node.all_input_nodes if operand is not mask]
    return found


def _mixes_rows(node: fx.Node, rows: Any) -> str:
    """Why a row may see another in a node, or how many there are; "" if it does not."""
    symbols = symbols_of(rows)

    def is_about_rows(size: Any) -> bool:
        return bool(symbols_of(size) & symbols)

    if not is_tensor_or_tuple(node):
        return ""  # an integer: what is computed with it will be asked
    if node.target is aten.repeat.default:
        return _repeats(node, is_about_rows)
    if isinstance(node.target, OpOverload) and numbers_about(node, symbols):
        return f"{op_name(node.target)} computes with the number of rows"
    tensors = [one for one in (node, *node.all_input_nodes) if is_tensor(one)]
    if not any(is_about_rows(size) for tensor in tensors for size in shape_of(tensor)):
        return ""
    if node.target in UNTAGGED_POINTWISE:
        return ""
    if node.target not in ATTENTIONS:
        return mixes(node, rows, BATCH)
    operands = [*args_of(node)[:3], argument(node, 3, "attn_mask")]
    shapes = [shape_of(operand) for operand in operands if isinstance(operand, fx.Node)]
    return "its attention is over rows" if any(is_about_rows(size) for shape in shapes for size in shape[-2:]) else ""


def _build(program: LaneProgram, on_rows: set[fx.Node], dims: RowDims) -> SplitRun:
    both = HalvesBuilder()
    graph, shared, halves = both.graph, both.shared, both.halves
    inputs = dims.specs(program.inputs)
    placeholders = program.graph.find_nodes(op="placeholder")
    for node in placeholders:
        (halves[0] if node in on_rows else shared)[node] = graph.placeholder(node.name)
    with_rows = [node for node in placeholders if node in on_rows]
    for node, spec in zip(with_rows, inputs[len(program.inputs) :], strict=True):
        halves[1][node] = graph.placeholder(spec.name)
        assert halves[1][node].name == spec.name, f"the name {spec.name} is taken"
    segments = segments_of(node for node in program.graph.nodes if node.op == "call_function")
    for segment in segments:
        both.add(segment, on_rows)
    (results,) = args_of(program.graph.output_node())
    graph.output(tuple(ChainMap(half, shared)[result] for half in halves for result in results))
    graph.lint()
    halves_program = program.at(Program, module=fx.GraphModule({}, graph), inputs=inputs)
    plan = plan_of_both(program.plan, turns_of(segments, on_rows, set()))
    return SplitRun(halves_program, plan, dims)
