"""The layers and branches of a Transformer that recognition finds, as frozen records to be printed and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Replay:
    """A part of the graph that works on complete sums only, such as a norm, and that lanes repeat on what they see.

    Attributes:
        source: Node whose value it takes; everything else it reads is a weight.
        nodes: Its nodes, in graph order; the last one's value is the result.
    """

    source: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """One computation that reads the residual stream and adds to it.

    Attributes:
        index: Number of the branch, 1-based, in execution order over the whole model.
        layer: Number of its layer, 0-based.
        kind: "attention" or "ffn".
        path: Module path in the source model ("" if the graph does not carry one).
        stream: Node whose value the branch reads in the source model.
        reads: How many branches have contributed to `stream` (the branch's source point).
        output: Node whose value is the sum of what the lanes compute. Without `post`, what is added to the stream.
        nodes: Every node of the branch, in graph order; nodes shared with a sibling branch appear in both.
        heads: Query heads (0 for an FFN).
        kv_heads: Key and value heads as the weights hold them (0 for an FFN).
        columns: Width of the input of the output projection.
        post: What turns the whole output into what is added to the stream (a norm after the branch, sandwich norm).
        after: What turns the stream that the branch has joined into the next stream (post-norm).
        base: How many branches belong to streams before this one: 0, or in a decoder the number of its encoder's.
        unit: How many heads (of an FFN: columns) a lane has or has not together, because quantised weights have a scale
            for all of them.
    """

    index: int
    layer: int
    kind: str
    path: str
    stream: str
    reads: int
    output: str
    nodes: tuple[str, ...]
    heads: int = 0
    kv_heads: int = 0
    columns: int = 0
    post: Replay | None = None
    after: Replay | None = None
    base: int = 0
    unit: int = 1


@dataclass(frozen=True)
class Layer:
    """One layer: an attention branch, in a decoder with cross-attention a second, and the FFN branches that follow."""

    index: int
    path: str
    branches: tuple[Branch, ...]

    @property
    def parallel(self) -> bool:
        """True if the source model's branches all read the same point of the stream."""
        return len(self.branches) > 1 and len({branch.reads for branch in self.branches}) == 1


@dataclass(frozen=True)
class Encoder:
    """The stream of an encoder, which the branches of a decoder read besides their own.

    Attributes:
        embedding: Node where the stream begins.
        final: Node of the stream after its last branch.
        result: Node through which the decoder reads it.
    """

    embedding: str
    final: str
    result: str


@dataclass(frozen=True)
class LayerTable:
    """The residual stream and everything on it. Of an encoder-decoder the decoder's; the encoder's branches come first.

    Attributes:
        embedding: Node where the stream begins (all embeddings summed).
        joins: `joins[m]` is the node whose value is the stream after m branches, for every m at which the source model
            has one (parallel branches join together).
        final: Node of the stream after the last branch.
        head: The vocabulary projection's node, "" if the model has none.
        layers: The layers in order.
        encoder: The stream before this one, if there are two.
    """

    embedding: str
    joins: tuple[tuple[int, str], ...]
    final: str
    head: str
    layers: tuple[Layer, ...]
    encoder: Encoder | None = None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches in order; branch number k is at position k - 1."""
        return tuple(branch for layer in self.layers for branch in layer.branches)

    def names(self) -> Iterator[str]:
        """The names of all nodes that are mentioned."""
        yield from (self.embedding, self.final, *(name for _, name in self.joins))
        if self.head:
            yield self.head
        if self.encoder is not None:
            yield from (self.encoder.embedding, self.encoder.final, self.encoder.result)
        for branch in self.branches:
            yield from (branch.stream, branch.output, *branch.nodes)
            for replay in (branch.post, branch.after):
                if replay is not None:
                    yield from (replay.source, *replay.nodes)

    def with_nodes(self, nodes: Mapping[Branch, tuple[str, ...]]) -> LayerTable:
        """The table with other nodes in some branches."""
        layers = []
        for layer in self.layers:
            branches = tuple(replace(branch, nodes=nodes.get(branch, branch.nodes)) for branch in layer.branches)
            layers.append(replace(layer, branches=branches))
        return replace(self, layers=tuple(layers))
