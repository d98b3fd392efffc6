"""Run the tokens of a prefill as two halves, so that each half's reduces fly while the other half computes.

    A1 [start a1]  B1 [start b1]  wait a1, A2 [start a2]  wait b1, B2 [start b2]  wait a2, A3 ...

Of the step graph everything that lies on tokens is there twice, in turns behind every start; weights, tables and caches
are shared. In every layer A writes its keys and values before B attends to them, for A's share of a branch stands
before B's. What is computed for picked tokens only, the end of the last layer, is there once: it picks of both halves,
joined. No number changes: a step graph exists only where tokens meet in attentions alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.cache import CUT, FIRST_SLOTS, PAST, PICKS, POSITIONS, SECOND_PAST, SLOTS
from kraken_compiler.ir.program import InputSpec, LaneProgram, Program, SplitStep
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, aten, descendants
from kraken_compiler.passes.schedule.halves import HalvesBuilder, Turns, plan_of_both, segments_of, turns_of
from kraken_compiler.passes.shapes import is_tensor, shape_of, symbols_of

_END = (1 << 63) - 1


@dataclass(frozen=True)
class SplitTokens(Pass[LaneProgram]):
    name: ClassVar[str] = "split-tokens"
    requires: ClassVar[type[Program]] = LaneProgram

    def run(self, program: LaneProgram) -> PassResult:
        cached = program.cached
        if cached is None or cached.split is not None or not program.plan.reduces:
            return PassResult()
        splitter = _Splitter(cached.step)
        outcome = splitter.split()
        if isinstance(outcome, Rejection):
            return PassResult(program=replace(program, cached=replace(cached, no_split=str(outcome))))
        split = SplitStep(outcome, plan_of_both(program.plan, splitter.turns), splitter.turns.once)
        return PassResult(len(split.plan.reduces), program=replace(program, cached=replace(cached, split=split)))


class _Splitter(HalvesBuilder):
    """Builds the graph on two halves node by node."""

    def __init__(self, step: Program) -> None:
        super().__init__()
        self.step = step
        self.inputs: list[InputSpec] = []
        self.turns = Turns((), ())

    def split(self) -> Program | Rejection:
        """The graph on two halves, or why there is none."""
        step = self.step
        placeholders = {node.name: node for node in step.graph.nodes if node.op == "placeholder"}
        ids = placeholders[step.inputs[0].name]
        tail = descendants([placeholders[PICKS]])
        on_tokens = descendants([ids, *(placeholders[name] for name in (POSITIONS, SLOTS, PAST))]) - tail
        calls = [node for node in step.graph.nodes if node.op == "call_function"]
        obstacle = self._obstacle(calls, on_tokens, tail, symbols_of(shape_of(ids)[1]))
        if obstacle is not None:
            return obstacle
        self._placeholders(ids)
        segments = segments_of(calls)
        for segment in segments:
            self.add([node for node in segment if node not in tail], on_tokens)
            self._tail([node for node in segment if node in tail], on_tokens)
        self.turns = turns_of(segments, on_tokens, tail)
        (results,) = args_of(step.graph.output_node())
        self.graph.output(fx.node.map_arg(results, self.shared.__getitem__))
        self.graph.lint()
        return replace(step, module=fx.GraphModule({}, self.graph), inputs=(*step.inputs, *self.inputs))

    def _obstacle(
        self, calls: Iterable[fx.Node], on_tokens: set[fx.Node], tail: set[fx.Node], sequence: frozenset[Any]
    ) -> Rejection | None:
        """What the tail reads of the halves is joined along the sequence, so it must lie there."""
        for node in calls:
            for operand in node.all_input_nodes if node in tail else ():
                if operand not in on_tokens or operand.op == "placeholder":
                    continue
                if not is_tensor(operand):
                    if symbols_of(operand.meta.get("val")) & sequence:
                        return Rejection(
                            "behind its last branch it needs to know how many tokens there are", (node.name,)
                        )
                elif len(shape := shape_of(operand)) < 2 or symbols_of(shape[1]) != sequence:
                    return Rejection("what it computes behind its last branch is no row per token", (operand.name,))
        return None

    def _placeholders(self, ids: fx.Node) -> None:
        for node in self.step.graph.find_nodes(op="placeholder"):
            self.shared[node] = self.graph.placeholder(node.name)
            self.shared[node].meta = dict(node.meta)
        cut, first_slots, second_past = (self._size_input(name) for name in (CUT, FIRST_SLOTS, SECOND_PAST))
        size = self.graph.call_function(aten.sym_size.int, (cut, 0))
        first, second = self.halves
        for node in self.step.graph.find_nodes(op="placeholder"):
            if node is ids or node.name == POSITIONS:
                for half, ends in ((first, (0, size)), (second, (size, _END))):
                    part = self.graph.call_function(aten.slice.Tensor, (self.shared[node], 1, *ends))
                    half[node] = self.graph.call_function(aten.contiguous.default, (part,))
            elif node.name == SLOTS:
                first[node] = first_slots
            elif node.name == PAST:
                second[node] = second_past

    def _size_input(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        assert node.name == name, f"the name {name} is taken"
        self.inputs.append(InputSpec(name, name, "int64", (name,)))
        return node

    def _tail(self, calls: Iterable[fx.Node], on_tokens: set[fx.Node]) -> None:
        """What is computed for picked tokens, once; sizes in it are the batch's, which both halves have."""
        first, second = self.halves
        for node in calls:
            for operand in node.all_input_nodes:
                if operand in self.shared or operand not in on_tokens:
                    continue
                if is_tensor(operand):
                    self.shared[operand] = self.graph.call_function(
                        aten.cat.default, ([first[operand], second[operand]], 1)
                    )
                else:
                    self.shared[operand] = first[operand]
            self.copy(node, self.shared, self.shared)
