"""The step graph as a serving engine runs it: on the new tokens of many sequences in one row, cut before the head.

    step(ids [b, t], positions [b, t], caches, picks [b, k], ...)     body(ids [1, t], positions [1, t], tables)
    %y = kraken.cached_attention(%q, %k, %v, %key_0, ...)     ->      %y = kraken.engine_attention(%q, %k, %v, 0)
    %p = gather(%x, 1, %picks)  # the last token of each row          the same for all tokens; ends in hidden states
    %l = linear(%n, %w)                                               head(hidden [1, n, h]): from there to the logits

That all tokens can lie in one row is what the cache pass has proven: they meet in attentions alone. Of which tokens
logits are wanted the engine says between body and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from kraken_compiler.backends.vllm.format import HIDDEN, IDS, POSITIONS, TABLE, EngineAttention, EngineRecord
from kraken_compiler.errors import Rejection
from kraken_compiler.ir import cache
from kraken_compiler.ir.program import CachedProgram
from kraken_compiler.ops.cached_attention import CACHED_ATTENTION
from kraken_compiler.ops.engine_attention import ENGINE_ATTENTION
from kraken_compiler.ops.op_sets import PROJECTIONS
from kraken_compiler.passes.graph_tools import ancestors, args_of, argument, aten, calls, descendants, module_path
from kraken_compiler.passes.graph_tools import replace as replace_node
from kraken_compiler.passes.shapes import compute_shape, fake_mode_of, is_tensor, refresh_shapes, same_size, shape_of


@dataclass(frozen=True)
class FlatProgram:
    """A lane program for an engine. Placeholders of its graphs: the weights that they read, then their inputs.

    Attributes:
        body: (ids [1, T], positions [1, T], tables) -> hidden states [1, T, hidden size].
        head: (hidden states [1, n, hidden size]) -> logits [1, n, vocabulary].
        prepare: (ids [1, capacity] of any value) -> the tables, then slopes and sinks.
        record: What the attentions are, and the sizes.
    """

    body: fx.Graph
    head: fx.Graph
    prepare: fx.Graph
    record: EngineRecord


def flattened(cached: CachedProgram, weights: Iterable[str]) -> FlatProgram | Rejection:
    """The program for an engine, or why there is none.

    Args:
        cached: The program with a KV cache; it is not changed.
        weights: The names of the placeholders that are weights.
    """
    return _Flattener(cached, frozenset(weights)).run()


class _Flattener:
    def __init__(self, cached: CachedProgram, weights: frozenset[str]) -> None:
        self.plan, self.weights = cached.plan, weights
        self.graph = cached.step.copy().graph
        self.prepare = cached.tables.copy().graph
        self.inputs = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        self.ids = self.inputs[cached.step.inputs[0].name]
        self.batch, self.tokens = shape_of(self.ids)
        self.outputs = [*args_of(self.prepare.output_node())[0]]

    def run(self) -> FlatProgram | Rejection:
        self._take_all_tokens()
        attentions: list[EngineAttention] = []
        for node in list(calls(self.graph, CACHED_ATTENTION)):
            attention = self._attention(node, len(attentions))
            if isinstance(attention, Rejection):
                return attention
            attentions.append(attention)
        self.graph.eliminate_dead_code()
        (logits,) = args_of(self.graph.output_node())[0]
        cut = self._hidden_states(logits)
        if isinstance(cut, Rejection):
            return cut
        head = self._part({cut: HIDDEN}, logits)
        if isinstance(head, Rejection):
            return head
        body = self._part({self.ids: IDS, self.inputs[POSITIONS]: POSITIONS}, cut)
        if isinstance(body, Rejection):
            return body
        self.prepare.erase_node(self.prepare.output_node())
        self.prepare.output(tuple(self.outputs))
        for node in self.prepare.find_nodes(op="placeholder"):
            if not node.users and node.name in self.weights:
                self.prepare.erase_node(node)
        self.prepare.lint()
        record = EngineRecord(
            attentions=tuple(attentions),
            hidden_size=int(shape_of(cut)[-1]),
            vocabulary=int(shape_of(logits)[-1]),
            tables=len(self.plan.tables),
        )
        return FlatProgram(body, head, self.prepare, record)

    def _take_all_tokens(self) -> None:
        """Let what is computed for picked tokens be computed for all: the picks are all there are, in order."""
        picks = self.inputs[cache.PICKS]
        of_picks = descendants([picks])
        for node in list(self.graph.nodes):
            if node.target is aten.gather.default and _read_inputs(args_of(node)[2]) == {picks}:
                # Of tokens, or of their positions, which are expanded to the rows of the batch: there is one.
                replace_node(node, args_of(node)[0])
            elif node.target is aten.sym_size.int and args_of(node)[0] is picks:
                node.args = (self.ids, args_of(node)[1])
        for node in of_picks & set(self.graph.nodes):
            if node.op == "call_function":
                node.meta.pop("val", None)
        refresh_shapes(self.graph)

    def _attention(self, node: fx.Node, number: int) -> EngineAttention | Rejection:
        query, key, value = args_of(node)[:3]
        head_size, value_size = (int(shape_of(operand)[3]) for operand in (query, value))
        scale = argument(node, 10, "scale")
        # An engine's heads have one size: the rest of the smaller ones is zeros, which add nothing to a product.
        size = max(head_size, value_size)
        query, key, value = (self._padded(operand, size, node) for operand in (query, key, value))
        slopes, sinks = argument(node, 8, "slopes"), argument(node, 12, "sinks")
        heads, kv_heads = (int(shape_of(operand)[1]) for operand in (query, value))
        if heads % kv_heads:
            reason = f"{heads} query heads share {kv_heads} KV heads unevenly"
            return Rejection(reason, (node.name,), module_path(node))
        attention = EngineAttention(
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            value_size=size,
            scale=float(head_size**-0.5 if scale is None else scale),
            window=int(argument(node, 9, "window", 0)),
            softcap=float(argument(node, 11, "softcap", 0.0)),
            slopes=None if slopes is None else self.plan.tables.index(slopes.name),
            sinks=None if sinks is None else self._prepared(sinks),
        )
        with self.graph.inserting_before(node):
            new = self.graph.call_function(ENGINE_ATTENTION, (query, key, value, number))
            if value_size < size:
                new = self.graph.call_function(aten.slice.Tensor, (self._shaped(new, node), 3, 0, value_size))
        new.meta = dict(node.meta)
        replace_node(node, new)
        return attention

    def _padded(self, operand: fx.Node, size: int, before: fx.Node) -> fx.Node:
        """Heads of a size, with zeros behind those that are smaller."""
        missing = size - int(shape_of(operand)[3])
        if not missing:
            return operand
        with self.graph.inserting_before(before):
            padded = self.graph.call_function(aten.constant_pad_nd.default, (operand, [0, missing]))
        return self._shaped(padded, before)

    def _shaped(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """The node, with its own shape and what is known of another besides."""
        node.meta = dict(like.meta)
        return compute_shape(node, fake_mode_of(self.graph))

    def _prepared(self, node: fx.Node) -> int:
        """Let a value that follows from weights alone be computed at load; returns its number among the outputs."""
        values = {placeholder.name: placeholder for placeholder in self.prepare.find_nodes(op="placeholder")}
        copies: dict[fx.Node, fx.Node] = {}
        needed = ancestors(node)
        with self.prepare.inserting_before(self.prepare.output_node()):
            for other in (other for other in self.graph.nodes if other in needed):
                is_input = other.op == "placeholder"
                copies[other] = values[other.name] if is_input else self.prepare.node_copy(other, copies.__getitem__)
        self.outputs.append(copies[node])
        return len(self.outputs) - 1

    def _hidden_states(self, logits: fx.Node) -> fx.Node | Rejection:
        """The value that all logits pass through last, before the product with the vocabulary's weight."""
        place = {node: number for number, node in enumerate(self.graph.nodes)}
        on_tokens = descendants([self.ids, self.inputs[POSITIONS]])
        frontier, has_product = {logits}, False
        while True:
            node = max(frontier, key=place.__getitem__)
            if has_product and frontier == {node} and self._is_row_per_token(node):
                return node
            if node.op == "placeholder":
                return Rejection("no single value leads to its logits", (logits.name,))
            frontier.remove(node)
            frontier |= {operand for operand in node.all_input_nodes if operand in on_tokens and is_tensor(operand)}
            has_product = has_product or node.target in PROJECTIONS

    def _is_row_per_token(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        is_row = len(shape) == 3 and same_size(shape[0], self.batch) and same_size(shape[1], self.tokens)
        return is_row and isinstance(shape[2], int)

    def _part(self, inputs: Mapping[fx.Node, str], result: fx.Node) -> fx.Graph | Rejection:
        """The graph from some values, its inputs of these names, to a result; it also reads weights and tables."""
        graph, values = fx.Graph(), {}
        needed = ancestors(result, stop=inputs.keys())
        for node in (node for node in self.graph.find_nodes(op="placeholder") if node in needed):
            assert node.name in self.weights or node.name.startswith(TABLE), f"{node.name} is neither weight nor table"
            values[node] = graph.placeholder(node.name)
        for node, name in inputs.items():
            values[node] = graph.placeholder(name)
        for node in (node for node in self.graph.nodes if node in needed and node not in values):
            if not is_tensor(node) and any(operand not in values for operand in node.all_input_nodes):
                # A size of what lies before the inputs: they have it too, or there is no such graph.
                places = [
                    (one, dim) for one in inputs for dim in (0, 1) if same_size(node.meta["val"], shape_of(one)[dim])
                ]
                if not places:
                    return Rejection("behind its last branch it needs a size that hidden states lack", (node.name,))
                (source, dim), *_ = places
                values[node] = graph.call_function(aten.sym_size.int, (values[source], dim))
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
        graph.output((values[result],))
        graph.lint()
        return graph


def _read_inputs(node: fx.Node) -> set[fx.Node]:
    """The inputs that a value follows from."""
    return {other for other in ancestors(node) if other.op == "placeholder"}
