"""Rebuild the residual stream so that every branch reads what its form says, and insert the reduces.

    %a = %x + attention(norm(%x))        ->     %h = kraken.all_reduce_start(attention(norm(%x)))
    %y = %a + ffn(norm(%a))                     %a = %x + kraken.wait(%h)
                                                ...

Each branch is built again on its own read, so branches that shared a norm in the source model get one each where their
reads differ. The nodes a branch does not share with the stream (masks, rotary tables) are kept once.

An encoder's stream is rebuilt first; what the decoder reads of it stands where its first reader does, so that the
encoder's last reduce is under way while the decoder begins.

Norms after branches and on the stream work on complete sums. Branches with such norms in between share a reduce all the
same: their outputs travel side by side. A lane that reads its own parts early repeats the norms on what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.ir.layers import Branch, Encoder, LayerTable, Replay
from kraken_compiler.ir.program import Planned, Program
from kraken_compiler.ir.schedule import Reduce
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.form.derive_schedule import sums_of
from kraken_compiler.passes.graph_tools import aten, descendants, value_descendants
from kraken_compiler.passes.shapes import same_shape, shape_of, value_of

_START = torch.ops.kraken.all_reduce_start.default
_WAIT = torch.ops.kraken.wait.default


@dataclass(frozen=True)
class RewireStream(Pass[Planned]):
    name: ClassVar[str] = "rewire-stream"
    requires: ClassVar[type[Program]] = Planned

    def run(self, program: Planned) -> PassResult:
        starts = sum(node.target is _START for node in program.graph.nodes)
        if starts == len(program.plan.reduces):
            return PassResult()
        builder = _Builder(program)
        program.module = fx.GraphModule(program.module, builder.build())
        program.layers = builder.renamed_layers()
        return PassResult(len(builder.reduces))


class _Builder:
    """Builds the new graph: what comes before the stream, the branches in order, what comes after."""

    def __init__(self, program: Planned) -> None:
        self.program, self.layers, self.plan = program, program.layers, program.plan
        # Those of embeddings are in the graph, in front of the streams.
        self.reduces = [reduce for reduce in program.plan.reduces if not reduce.is_lookup]
        self.old = {node.name: node for node in program.graph.nodes}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.copies: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.parts: list[fx.Node] = []
        self.stream: dict[tuple[int, int], fx.Node] = {}
        """The whole stream by the point at which it began and the point that it has reached."""
        self.sums: dict[tuple[int, int], fx.Node] = {}
        self.handles: dict[int, fx.Node] = {}
        self.replays: dict[tuple[Replay, fx.Node], tuple[fx.Node, ...]] = {}
        self.whole: dict[Replay, fx.Node] = {}

    def build(self) -> fx.Graph:
        final = self.old[self.layers.final]
        embeddings = self._embeddings()
        on_stream = value_descendants(embeddings.values()) - set(embeddings.values())
        for node in self.program.graph.nodes:
            if node not in on_stream and node.op != "output":
                self.new[node] = self._copy(node, self.new)
        self.stream = {(base, base): self.new[embedding] for base, embedding in embeddings.items()}
        for branch in self.layers.branches:
            self._branch(branch)
        self._finish_encoder()
        self.new[final] = self._point(len(self.parts), self._base)
        tail = descendants([final]) - {final}
        for node in self.program.graph.nodes:
            if node in tail:
                self.new[node] = self._copy(node, self.new)
        return self.graph

    @property
    def _base(self) -> int:
        """The point at which the stream that reaches the output begins."""
        return self.layers.branches[-1].base

    def _embeddings(self) -> dict[int, fx.Node]:
        """The nodes where the streams begin, by their first points."""
        encoder, embedding = self.layers.encoder, self.old[self.layers.embedding]
        return {self._base: embedding} | ({} if encoder is None else {0: self.old[encoder.embedding]})

    def _finish_encoder(self) -> None:
        """Build what lies between the encoder's last branch and the branches that read it, once."""
        encoder = self.layers.encoder
        if encoder is None or self.old[encoder.final] in self.new:
            return
        final = self.old[encoder.final]
        self.new[final] = self._point(self._base, 0)
        in_branches = {self.old[name] for branch in self.layers.branches for name in branch.nodes}
        between = descendants([final]) - value_descendants([self.old[self.layers.embedding]]) - in_branches - {final}
        for node in self.program.graph.nodes:
            if node in between:
                self.new[node] = self._copy(node, self.new)

    def renamed_layers(self) -> LayerTable:
        """The layer table with the new graph's node names."""
        layers = []
        for layer in self.layers.layers:
            branches = []
            for branch in layer.branches:
                read = self._read(branch)
                names = tuple(self.copies[self.old[name], read].name for name in branch.nodes)
                output = self.copies[self.old[branch.output], read].name
                post, after = self._renamed_replay(branch.post), self._renamed_replay(branch.after)
                branches.append(replace(branch, stream=read.name, output=output, nodes=names, post=post, after=after))
            layers.append(replace(layer, branches=tuple(branches)))
        head, encoder = self.layers.head, self.layers.encoder
        points = {point: node.name for (base, point), node in sorted(self.stream.items()) if point > base or point == 0}
        if encoder is not None:
            result = self.new[self.old[encoder.result]].name
            encoder = Encoder(self.stream[0, 0].name, self.new[self.old[encoder.final]].name, result)
        return replace(
            self.layers,
            embedding=self.stream[self._base, self._base].name,
            joins=tuple(sorted(points.items())),
            encoder=encoder,
            final=self.new[self.old[self.layers.final]].name,
            head=self.new[self.old[head]].name if head in self.old else head,
            layers=tuple(layers),
        )

    def _renamed_replay(self, replay: Replay | None) -> Replay | None:
        """The replay of what all lanes have summed, with the new graph's node names."""
        if replay is None:
            return None
        source = self.whole[replay]
        return Replay(source.name, tuple(node.name for node in self.replays[replay, source]))

    def _copy(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
        copy = self.graph.node_copy(node, lambda operand: values[operand])
        copy.meta = dict(node.meta)
        return copy

    def _branch(self, branch: Branch) -> None:
        source, read = self.old[branch.stream], self._read(branch)
        if self._reads_encoder(branch):
            self._finish_encoder()
        values = _Overlay(self.new, {source: read})
        for name in branch.nodes:
            node = self.old[name]
            if (node, read) not in self.copies:
                self.copies[node, read] = self._copy(node, values)
            values[node] = self.copies[node, read]
        part = values[self.old[branch.output]]
        self.parts.append(part)
        for reduce in self.reduces:
            if reduce.last == branch.index:
                self.handles[reduce.index] = self._like(_START, self._payload(reduce))

    def _reads_encoder(self, branch: Branch) -> bool:
        encoder = self.layers.encoder
        return encoder is not None and any(
            self.old[encoder.result] in self.old[name].all_input_nodes for name in branch.nodes
        )

    def _read(self, branch: Branch) -> fx.Node:
        """G[peers] + (O[own] - O[peers]): the whole stream plus the lane's own parts since."""
        read = self.plan.reads[branch.index - 1]
        stream = self._point(read.peers, branch.base)
        for first, last in sums_of(self.layers.branches, read.peers + 1, read.own):
            stream = self._join(stream, last, self._sum(first, last))
        return stream

    def _point(self, point: int, base: int) -> fx.Node:
        """The whole stream that begins at `base` after `point` branches; waits for reduces that are under way."""
        if (base, point) not in self.stream:
            reduce = self._reduce_ending_at(point)
            value = self._point(reduce.first - 1, base)
            total = self._like(_WAIT, self.handles[reduce.index])
            for (_, last), whole in zip(self._sums(reduce), self._unpack(total, reduce), strict=True):
                value = self.stream[base, last] = self._join(value, last, whole, is_whole=True)
        return self.stream[base, point]

    def _sums(self, reduce: Reduce) -> tuple[tuple[int, int], ...]:
        return sums_of(self.layers.branches, reduce.first, reduce.last)

    def _payload(self, reduce: Reduce) -> fx.Node:
        """The operand of a reduce: one sum of parts, or several side by side."""
        parts = [self._sum(first, last) for first, last in self._sums(reduce)]
        return parts[0] if len(parts) == 1 else self.graph.call_function(aten.cat.default, (parts, self._last_dim))

    def _unpack(self, total: fx.Node, reduce: Reduce) -> list[fx.Node]:
        count = len(self._sums(reduce))
        if count == 1:
            return [total]
        width = int(shape_of(self.old[self.layers.branches[reduce.first - 1].stream])[-1])
        ranges = [(place * width, (place + 1) * width) for place in range(count)]
        return [self.graph.call_function(aten.slice.Tensor, (total, self._last_dim, *ends)) for ends in ranges]

    @property
    def _last_dim(self) -> int:
        return len(shape_of(self.old[self.layers.embedding])) - 1

    def _join(self, stream: fx.Node, number: int, branch_sum: fx.Node, *, is_whole: bool = False) -> fx.Node:
        """The stream after branch `number`, whose output (with that of those it shares a sum with) is `branch_sum`."""
        branch = self.layers.branches[number - 1]
        total = self._add(stream, self._apply_replay(branch.post, branch_sum, is_whole))
        return self._apply_replay(branch.after, total, is_whole)

    def _apply_replay(self, replay: Replay | None, value: fx.Node, is_whole: bool) -> fx.Node:
        if replay is None:
            return value
        if is_whole:
            self.whole[replay] = value
        if (replay, value) not in self.replays:
            values = _Overlay(self.new, {self.old[replay.source]: value})
            for name in replay.nodes:
                values[self.old[name]] = self._copy(self.old[name], values)
            self.replays[replay, value] = tuple(values[self.old[name]] for name in replay.nodes)
        return self.replays[replay, value][-1]

    def _reduce_ending_at(self, point: int) -> Reduce:
        return next(reduce for reduce in self.reduces if reduce.last == point)

    def _sum(self, first: int, last: int) -> fx.Node:
        """The lane's own parts of branches first..last."""
        if first == last:
            return self.parts[first - 1]
        if (first, last) not in self.sums:
            self.sums[first, last] = self._add(self._sum(first, last - 1), self.parts[last - 1])
        return self.sums[first, last]

    def _add(self, left: fx.Node, right: fx.Node) -> fx.Node:
        key = (left, right)
        if key not in self.copies:
            same = "val" in left.meta and "val" in right.meta and same_shape(left, right)
            if same and value_of(left).dtype == value_of(right).dtype:
                self.copies[key] = self._like(aten.add.Tensor, left, right)
            else:
                self.copies[key] = self.graph.call_function(aten.add.Tensor, (left, right))
        return self.copies[key]

    def _like(self, target: Any, operand: fx.Node, *others: fx.Node) -> fx.Node:
        """A call that gives a tensor like its operand: to run it on fakes would be most of this pass's time."""
        node = self.graph.call_function(target, (operand, *others))
        if "val" in operand.meta:
            node.meta["val"] = operand.meta["val"]
        return node


class _Overlay(dict[fx.Node, fx.Node]):
    """A few values on top of many."""

    def __init__(self, base: dict[fx.Node, fx.Node], top: dict[fx.Node, fx.Node]) -> None:
        super().__init__(top)
        self._base = base

    def __missing__(self, node: fx.Node) -> fx.Node:
        return self._base[node]
