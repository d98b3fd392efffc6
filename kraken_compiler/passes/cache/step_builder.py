"""Builder of the step graph: every node of a lane graph that depends on tokens, on new tokens only and with caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kraken_compiler._torch_compat import largest_size, new_dynamic_size
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.cache import PAST, PICKS, POSITIONS, SLOTS, CachePlan, CacheSpec
from kraken_compiler.ir.program import CachedProgram, InputSpec, LaneProgram, Program
from kraken_compiler.ops.cached_attention import CACHED_ATTENTION
from kraken_compiler.ops.op_sets import ATTENTIONS, CAPPED_ATTENTION, DEQUANTIZE
from kraken_compiler.passes.cache.classify_masks import MaskRule, classify_mask
from kraken_compiler.passes.cache.compare_lengths import compare_lengths
from kraken_compiler.passes.cache.hoist_tables import Tables, gather, used_rank
from kraken_compiler.passes.cache.length_independence import LengthIndependence
from kraken_compiler.passes.cache.mixing import mixes
from kraken_compiler.passes.cache.positional_values import origins
from kraken_compiler.passes.cache.unrepeat import unrepeated
from kraken_compiler.passes.graph_tools import (
    ancestors,
    args_of,
    argument,
    aten,
    in_order,
    module_path,
    value_descendants,
)
from kraken_compiler.passes.sample_inputs import NO_LIMIT, position_limit
from kraken_compiler.passes.shapes import (
    compute_shape,
    fake_mode_of,
    is_tensor,
    is_tensor_or_tuple,
    same_size,
    shape_of,
    symbols_of,
    value_of,
)

_WAIT = torch.ops.kraken.wait.default


class StepBuilder:
    """Builds the step graph node by node, and the tables graph as tables turn out to be needed."""

    def __init__(self, program: LaneProgram, tokens: fx.Node, logits: fx.Node) -> None:
        self.program, self.tokens, self.logits = program, tokens, logits
        self.final = next(node for node in program.graph.nodes if node.name == program.layers.final)
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.table_inputs: list[fx.Node] = []
        self.lookups: dict[tuple[fx.Node, int, bool], fx.Node] = {}
        self.rows: dict[tuple[Any, ...], fx.Node] = {}
        self.expansions: dict[fx.Node, fx.Node] = {}
        self.caches: list[CacheSpec] = []
        self.rules: dict[fx.Node | None, MaskRule] = {}
        self.inputs: list[InputSpec] = []
        self.limits: list[int] = []
        self.proofs = LengthIndependence(tokens)
        self.on_tokens: set[fx.Node] = set()
        self.tail: set[fx.Node] = set()
        self.picked: dict[fx.Node, fx.Node] = {}
        self.pick_indices: dict[int, fx.Node] = {}
        self.mode = fake_mode_of(program.graph)
        self.tables = Tables(program.graph, tokens, self.mode)

    def build(self) -> CachedProgram | Rejection:
        """The step program, or why there is none."""
        needed_nodes = ancestors(self.logits)
        on_tokens = self.on_tokens = value_descendants([self.tokens]) & needed_nodes
        if self.final not in on_tokens or len(shape_of(self.final)) != 3:
            return Rejection("its residual stream does not reach the logits", (self.logits.name,))
        for node in self.program.graph.nodes:
            # First, because "not causal" says more about an encoder than whatever else is in the way.
            rule = self._rule(node) if node in on_tokens and node.target in ATTENTIONS else None
            if isinstance(rule, Rejection):
                return rule
        self._placeholders()
        self.tail = self._find_tail()
        if self.logits not in self.tail:
            return Rejection("its logits cannot be computed for some tokens alone", (self.logits.name,))
        for node in self.program.graph.nodes:
            if node not in on_tokens or node is self.tokens:
                continue
            rejection = self._attention(node) if node.target in ATTENTIONS else self._plain(node)
            if rejection is not None:
                return rejection
        self.graph.output((self.new[self.logits],))
        # Keys are stored as they are before they are repeated. A placeholder that nothing reads is still an input.
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self._program()

    def _find_tail(self) -> set[fx.Node]:
        """What is computed for picked tokens only: nothing but the logits needs it, through no attention.

        Of the last layer that is all behind its attention. Where it begins tokens are picked out of rows of numbers,
        [batch, sequence, width].
        """
        nodes = [node for node in self.program.graph.nodes if node in self.on_tokens and node.target not in ATTENTIONS]
        for_all_tokens: set[fx.Node] = set()
        while True:
            tail: set[fx.Node] = set()
            for node in reversed(nodes):
                users = [user for user in node.users if user in self.on_tokens]
                if node not in for_all_tokens and (node is self.logits or (users and tail.issuperset(users))):
                    tail.add(node)
            unfit = {node for node in tail if not self._can_take_picked(node, tail)}
            if not unfit:
                return tail
            for_all_tokens |= unfit

    def _can_take_picked(self, node: fx.Node, tail: set[fx.Node]) -> bool:
        """True if tokens can be picked of what a node of the tail takes from before it."""
        for operand in node.all_input_nodes:
            if operand in tail or operand not in self.on_tokens or not is_tensor_or_tuple(operand):
                continue
            if not is_tensor(operand):
                return False
            shape = shape_of(operand)
            if len(shape) != 3 or not all(map(same_size, shape[:2], shape_of(self.tokens))):
                return False
            # A sum that has begun can only be awaited.
            if not isinstance(shape[2], int) or node.target is _WAIT:
                return False
        return True

    def _program(self) -> CachedProgram:
        program = self.program
        bounds = [*self.limits, position_limit(program), largest_size(shape_of(self.tokens)[1]) or NO_LIMIT]
        limit = min(*bounds, *(rule.limit or NO_LIMIT for rule in self.rules.values()), NO_LIMIT)
        plan = CachePlan(
            tuple(self.caches),
            tuple(node.name for node in self.table_inputs),
            limit if limit < NO_LIMIT else None,
        )
        tables = self.tables.finish()
        call = replace(program.call, out_names=("logits",), none_outputs=())
        step = program.at(
            Program,
            module=fx.GraphModule({}, self.graph),
            inputs=(*program.inputs, *self.inputs),
            call=call,
            weights=dict(program.weights),
        )
        table_program = program.at(Program, module=fx.GraphModule({}, tables), call=call, weights=dict(program.weights))
        return CachedProgram(step, table_program, plan)

    def _placeholders(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.new[node] = self.graph.node_copy(node)
                self.new[node].meta = dict(node.meta)
        self.tables.begin()
        batch, sequence = shape_of(self.tokens)
        sizes = {name: new_dynamic_size(self.mode, name) for name in ("slots", "past", "picks", "capacity")}
        self.capacity = sizes["capacity"]
        self.positions = self._input(POSITIONS, (batch, sequence), torch.int64, ("batch", "sequence"))
        self.slots = self._input(SLOTS, (sizes["slots"],), torch.int64, ("slots",))
        self.past = self._input(PAST, (sizes["past"],), torch.int64, ("past",))
        self.picks = self._input(PICKS, (batch, sizes["picks"]), torch.int64, ("batch", "picks"))

    def _input(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype, symbols: tuple[int | str, ...]) -> fx.Node:
        last = next(node for node in reversed(self.graph.nodes) if node.op == "placeholder")
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        assert node.name == name, f"the name {name} is taken"
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        self.inputs.append(InputSpec(name, name, str(dtype).removeprefix("torch."), symbols))
        return node

    def _plain(self, node: fx.Node) -> Rejection | None:
        """Copy a node; its position tables are looked up, and in the tail there are only picked tokens."""
        in_tail = node in self.tail
        reason = mixes(node, shape_of(self.tokens)[1])
        if reason:
            return Rejection(reason, (node.name,), module_path(node))
        if is_tensor(node) and self.proofs.numbers_of_tokens(node):
            return self._reject_count(node)
        for operand in node.all_input_nodes:
            if operand in self.new:
                continue
            rejection = self._operand(operand, node, in_tail)
            if rejection is not None:
                return rejection
        values: dict[fx.Node, fx.Node] = {}
        for operand in node.all_input_nodes:
            if operand not in self.new:
                values[operand] = self._lookup(operand, node, in_tail)
            elif in_tail and not is_tensor(operand):
                values[operand] = self._size_in_tail(operand)
            elif in_tail and operand in self.on_tokens and operand not in self.tail:
                values[operand] = self._picked_tokens(operand)
            else:
                values[operand] = self.new[operand]
        self.new[node] = self.graph.node_copy(node, values.__getitem__)
        new = self.new[node]
        new.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        has_lookups = any(operand not in self.new for operand in node.all_input_nodes)
        if in_tail or has_lookups:
            return self._refresh(new, node, in_tail)
        # Same operands, same shape: to compute it again would be most of this pass's time.
        new.meta["val"] = node.meta["val"]
        return None

    def _reject_count(self, node: fx.Node) -> Rejection:
        """The rejection of a node that takes a size as a number: in the step graph that counts new tokens only."""
        return Rejection("it depends on the total length, which it takes as a number", (node.name,), module_path(node))

    def _operand(self, operand: fx.Node, node: fx.Node, in_tail: bool) -> Rejection | None:
        """Provide for an operand that depends on no token."""
        if not is_tensor(operand):
            return self._size(operand)
        if self._is_dequantized(operand):
            # As a table it would be there in full, for as long as the model is.
            self._whole(operand)
            return None
        return self._table(operand, node, in_tail)

    def _refresh(self, new: fx.Node, like: fx.Node, in_tail: bool) -> Rejection | None:
        compute_shape(new, self.mode)
        if in_tail or not is_tensor(like):
            return None
        actual, expected = value_of(new), value_of(like)
        same = len(actual.shape) == len(expected.shape) and all(map(same_size, actual.shape, expected.shape))
        if same and actual.dtype == expected.dtype:
            return None
        reason = (
            f"with a cache it would be {actual.dtype} {list(actual.shape)} instead of "
            f"{expected.dtype} {list(expected.shape)}"
        )
        return Rejection(reason, (like.name,), module_path(like))

    def _size(self, node: fx.Node) -> Rejection | None:
        """Copy a computed size with what it is computed from."""
        place = {other: number for number, other in enumerate(self.program.graph.nodes)}
        for other in in_order(place, ancestors(node, stop=set(self.new))):
            if is_tensor(other):
                reason = f"a size is computed from the numbers in a tensor ({other.name})"
                return Rejection(reason, (node.name,), module_path(other))
            self.new[other] = self.graph.node_copy(other, self.new.__getitem__)
            self.new[other].meta = dict(other.meta)
        return None

    def _is_sequence(self, node: fx.Node) -> bool:
        return bool(same_size(node.meta["val"], shape_of(self.tokens)[1]))

    def _size_in_tail(self, node: fx.Node) -> fx.Node:
        """A size as it is behind the last layer, where there are as many tokens as were picked."""
        if self._is_sequence(node):
            return self._picks_size()
        if is_tensor(node) or not symbols_of(node.meta.get("val")) & symbols_of(shape_of(self.tokens)[1]):
            return self.new[node]
        values = {operand: self._size_in_tail(operand) for operand in node.all_input_nodes}
        return compute_shape(self.graph.node_copy(node, values.__getitem__), self.mode)

    def _picks_size(self) -> fx.Node:
        return compute_shape(self.graph.call_function(aten.sym_size.int, (self.picks, 1)), self.mode)

    def _table(self, operand: fx.Node, user: fx.Node, in_tail: bool) -> Rejection | None:
        rank = used_rank(operand, user)
        if (operand, rank, in_tail) in self.lookups:
            return None
        rejection = self._length_dependence(operand)
        if rejection is not None:
            return rejection
        entry = self.tables.add(operand, rank)
        if isinstance(entry, Rejection):
            return entry
        number, along = entry
        table = self._table_input(number)
        if along >= 0:
            key = (number, along, rank, in_tail)
            if key not in self.rows:
                positions = self._picked_positions() if in_tail else self.positions
                self.rows[key] = gather(self.graph, table, positions, along, rank, self.mode)
            table = self.rows[key]
        self.lookups[operand, rank, in_tail] = table
        return None

    def _length_dependence(self, operand: fx.Node) -> Rejection | None:
        """The rejection of a value that cannot be computed once for the capacity; None if its rows fit any length."""
        steady = self.tokens not in ancestors(operand) or self.proofs.is_steady(operand)
        if steady and not self.proofs.may_differ_by_row(operand):
            return None
        culprit = operand if steady else self.proofs.culprit(operand)
        comparison = compare_lengths(self.program, origins(self.program, operand))
        if isinstance(comparison, str):
            return Rejection(comparison, (culprit.name,), module_path(culprit))
        if comparison.by_row:
            reason = "what it computes from no token differs between the rows of a batch"
            return Rejection(reason, (culprit.name,), module_path(culprit))
        if comparison.beyond is not None:
            reason = (
                "what it computes from no token depends on the total length: "
                f"with {comparison.beyond} tokens it is other than with {comparison.limit}"
            )
            return Rejection(reason, (culprit.name,), module_path(culprit))
        if not steady:
            self.limits.append(comparison.limit)
        return None

    def _lookup(self, operand: fx.Node, user: fx.Node, in_tail: bool) -> fx.Node:
        """A table's rows, for every row of the batch where the user does not broadcast."""
        table = self.lookups[operand, used_rank(operand, user), in_tail]
        shape = shape_of(operand)
        broadcasts = is_tensor(user) and torch.Tag.pointwise in user.target.tags  # type: ignore[union-attr]
        if broadcasts or not shape or not same_size(shape[0], shape_of(self.tokens)[0]):
            return table
        # Positions have a single row where all rows of the batch are at the same place.
        if table not in self.expansions:
            batch = compute_shape(self.graph.call_function(aten.sym_size.int, (self.new[self.tokens], 0)), self.mode)
            size: list[Any] = [batch, *(-1 for _ in shape[1:])]
            call = self.graph.call_function(aten.expand.default, (table, size))
            self.expansions[table] = compute_shape(call, self.mode)
        return self.expansions[table]

    def _picked_positions(self) -> fx.Node:
        def call(target: Any, *args: Any) -> fx.Node:
            return compute_shape(self.graph.call_function(target, args), self.mode)

        rows = call(aten.sym_size.int, self.picks, 0)
        return call(aten.gather.default, call(aten.expand.default, self.positions, [rows, -1]), 1, self.picks)

    def _attention(self, node: fx.Node) -> Rejection | None:
        query, key, value = args_of(node)[:3]
        if argument(node, 4, "dropout_p", 0.0):
            return Rejection("its attention drops scores at random", (node.name,), module_path(node))
        mask, rule = argument(node, 3, "attn_mask"), self._rule(node)
        assert isinstance(rule, MaskRule), "build has asked before"
        if self.proofs.numbers_of_tokens(node):
            return self._reject_count(node)
        batch, sequence = shape_of(self.tokens)
        for part in (query, key, value):
            shape = shape_of(part)
            if len(shape) != 4 or not same_size(shape[0], batch) or not same_size(shape[2], sequence):
                reason = "its attention is not over [batch, heads, sequence, head size] of the tokens"
                return Rejection(reason, (node.name,), module_path(node))
        keys, values = unrepeated(key), unrepeated(value)
        if shape_of(keys)[1] != shape_of(values)[1]:
            keys, values = key, value
        number = len(self.caches)
        spec = CacheSpec(
            f"key_{number}",
            f"value_{number}",
            int(shape_of(keys)[1]),
            int(shape_of(keys)[3]),
            int(shape_of(values)[3]),
            str(value_of(keys).dtype).removeprefix("torch."),
        )
        self.caches.append(spec)
        stores = [
            self._input(
                name,
                (batch, spec.heads, self.capacity, dim),
                getattr(torch, spec.dtype),
                ("batch", spec.heads, "capacity", dim),
            )
            for name, dim in ((spec.key, spec.key_dim), (spec.value, spec.value_dim))
        ]
        operands = (self.new[query], self.new[keys], self.new[values], *stores, self.positions, self.slots, self.past)
        extra: tuple[Any, ...] = (self._slopes(rule, mask), rule.window, node.kwargs.get("scale"))
        if node.target is CAPPED_ATTENTION:
            sinks = node.kwargs.get("sinks")
            assert sinks is None or isinstance(sinks, fx.Node)
            extra += (node.kwargs.get("softcap", 0.0), None if sinks is None else self._whole(sinks))
        self.new[node] = self.graph.call_function(CACHED_ATTENTION, (*operands, *extra))
        return self._refresh(self.new[node], node, in_tail=False)

    def _rule(self, attention: fx.Node) -> MaskRule | Rejection:
        """The rule of an attention's mask."""
        mask = argument(attention, 3, "attn_mask")
        if mask is not None and mask in self.on_tokens:
            return Rejection("its mask depends on the inputs", (attention.name,), module_path(attention))
        if mask in self.rules:
            return self.rules[mask]
        rule = classify_mask(self.program, attention, self.proofs)
        # Without a mask it is the attention itself that says whether it is causal.
        if isinstance(rule, MaskRule) and mask is not None:
            self.rules[mask] = rule
        return rule

    def _whole(self, node: fx.Node) -> fx.Node:
        """A weight, or what has been computed of weights alone, in the step graph."""
        for other in sorted(ancestors(node, stop=set(self.new)), key=list(self.program.graph.nodes).index):
            self.new[other] = self.graph.node_copy(other, self.new.__getitem__)
            self.new[other].meta = dict(other.meta)
        return self.new[node]

    def _is_dequantized(self, node: fx.Node) -> bool:
        above = ancestors(node, stop=set(self.new))
        return self.tokens not in ancestors(node) and any(other.target is DEQUANTIZE for other in above)

    def _slopes(self, rule: MaskRule, mask: fx.Node | None) -> fx.Node | None:
        return self._table_input(self.tables.add_slopes(mask)) if rule.slopes and mask is not None else None

    def _table_input(self, number: int) -> fx.Node:
        """The input that brings a table."""
        while len(self.table_inputs) <= number:
            value = value_of(self.tables.outputs[len(self.table_inputs)])
            constant = all(isinstance(size, int) for size in value.shape)
            shape = tuple(value.shape) if constant else (self.capacity, *value.shape[1:])
            symbols = tuple(size if isinstance(size, int) else "capacity" for size in shape)
            name = f"table_{len(self.table_inputs)}"
            self.table_inputs.append(self._input(name, shape, value.dtype, symbols))
        return self.table_inputs[number]

    def _picked_tokens(self, rows: fx.Node) -> fx.Node:
        """The rows of the tokens whose logits are wanted."""

        def call(target: Any, *args: Any) -> fx.Node:
            return compute_shape(self.graph.call_function(target, args), self.mode)

        if rows not in self.picked:
            width = int(shape_of(rows)[2])
            if width not in self.pick_indices:
                index = call(aten.unsqueeze.default, self.picks, -1)
                self.pick_indices[width] = call(aten.expand.default, index, [-1, -1, width])
            self.picked[rows] = call(aten.gather.default, self.new[rows], 1, self.pick_indices[width])
        return self.picked[rows]
