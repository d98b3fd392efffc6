"""Make one lane of a Kraken model (`native/`) a lane among others: its weights are one of many, and lanes meet.

    %a = %x + attention(norm(%x))           ->     %h = kraken.all_reduce_start(%x)     once a layer, at its beginning
    %y = %a + ffn(norm(%a))                        %m = attention(norm(%x))
                                                   %s = kraken.wait(%h)
                                                   %y = (%x + %m) + ffn(norm(%s + %m))

The first layer's streams are all the embedding, so nothing is summed there. At the end every lane multiplies its stream
with its rows of W_concat, and one more sum joins them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.layers import Branch
from kraken_compiler.ir.program import Planned, Program, Recognized
from kraken_compiler.ir.schedule import FormPlan, Read, Reduce
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import aten
from kraken_compiler.passes.shapes import refresh_shapes, value_of
from kraken_compiler.weights.lane_tensors import in_blocks

NATIVE = "native"
"""What the layers' form is called: it is the model's own."""
ANY_LANE = "lanes.*."
"""In the name of a source tensor: those of all lanes, one behind the other along the first dim."""
_FIRST_LANE, _MODEL = "lanes.0.", "model."
_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default


def lane_source(name: str, lane: int) -> str:
    """The name of one lane's tensor, of a name with `ANY_LANE`."""
    return name.replace(ANY_LANE, f"lanes.{lane}.")


@dataclass(frozen=True)
class SpreadLanes(Pass[Recognized]):
    """Let the weights of the first lane be those of every lane, each its own.

    Attributes:
        degree: Number of lanes.
    """

    degree: int

    name: ClassVar[str] = "spread-lanes"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        if not any(spec.source.startswith(_MODEL) for spec in program.weights.values()):
            return PassResult()
        program.weights = {name: self._spread(spec) for name, spec in program.weights.items()}
        program.degree = self.degree
        return PassResult(sum(bool(spec.shards) for spec in program.weights.values()))

    def _spread(self, spec: WeightSpec) -> WeightSpec:
        source = spec.source.removeprefix(_MODEL)
        if not source.startswith(_FIRST_LANE):
            return replace(spec, source=source)
        return in_blocks(spec, source.replace(_FIRST_LANE, ANY_LANE, 1), self.degree)


@dataclass(frozen=True)
class JoinStreams(Pass[Recognized]):
    """Insert the sums, and note what hides each."""

    name: ClassVar[str] = "join-streams"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        nodes = {node.name: node for node in program.graph.nodes}
        final = nodes[program.layers.final]
        joins = [user for user in final.users if user.target is LINEAR]
        if len(joins) != 1 or len(final.users) != 1:
            return PassResult(rejections=(Rejection("its lanes are not joined by one projection", (final.name,)),))
        reduces: list[Reduce] = []
        for layer in program.layers.layers[1:]:
            attention, ffn = layer.branches
            self._sum_into(ffn, attention, nodes)
            width = _bytes_per_token(nodes[attention.stream])
            reduces.append(
                Reduce(len(reduces), attention.index - 2, attention.index - 1, ffn.index, (attention.index,), width)
            )
        (join,) = joins
        self._summed(join, [*join.users], program.graph)
        last = program.layers.branches[-1].index
        reduces.append(Reduce(len(reduces), last - 1, last, None, (), _bytes_per_token(join)))
        refresh_shapes(program.graph)
        # What a branch reads is what it reads in the model, whose form this is.
        reads = tuple(Read(branch.index, branch.reads, branch.reads) for branch in program.layers.branches)
        plan = FormPlan((NATIVE,) * len(program.layers.layers), reads, tuple(reduces))
        return PassResult(len(reduces), program=program.at(Planned, plan=plan))

    def _sum_into(self, ffn: Branch, attention: Branch, nodes: dict[str, fx.Node]) -> None:
        """Let an FFN read the sum of all streams, in the place of its own, and what its lane's attention has added."""
        stream, own = nodes[attention.stream], nodes[ffn.stream]
        readers = [nodes[name] for name in ffn.nodes if own in nodes[name].all_input_nodes]
        graph = stream.graph
        with graph.inserting_before(readers[0]):
            handle = graph.call_function(_START, (stream,))
            total = graph.call_function(_WAIT, (handle,))
            read = graph.call_function(aten.add.Tensor, (total, nodes[attention.output]))
        for reader in readers:
            reader.replace_input_with(own, read)

    def _summed(self, part: fx.Node, users: list[fx.Node], graph: fx.Graph) -> None:
        with graph.inserting_after(part):
            handle = graph.call_function(_START, (part,))
        with graph.inserting_after(handle):
            total = graph.call_function(_WAIT, (handle,))
        for user in users:
            user.replace_input_with(part, total)


def _bytes_per_token(node: fx.Node) -> int:
    value = value_of(node)
    return int(value.shape[-1]) * value.dtype.itemsize
