"""Give a lane its part of a tensor: through the weight table for weights, by selecting it for anything else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from kraken_compiler.ir.index_set import IndexSet, from_indices, in_units, size, to_indices
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.shards import Kept, KeptDim
from kraken_compiler.ir.weight_table import DimShard, WeightSpec
from kraken_compiler.ops.op_sets import DEQUANTIZE
from kraken_compiler.passes.graph_tools import args_of, aten, grain_of
from kraken_compiler.passes.shapes import fake_mode_of, shape_of
from kraken_compiler.passes.shard.weight_operands import CASTS, operand_part


@dataclass
class WeightSplitter:
    """Makes and reuses the lane-local versions of tensors while a graph is being cut to one lane.

    Attributes:
        program: The program whose graph and weight table are changed.
        shapes: Shapes before the split, by node name.
    """

    program: Program
    shapes: dict[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        placeholders = {node.name: node for node in self.program.graph.find_nodes(op="placeholder")}
        # Parts that another pass has made are taken again: a tied head and its embedding are one row of the table.
        self._nodes_by_key: dict[Any, fx.Node] = {
            _row(spec): placeholders[name] for name, spec in self.program.weights.items()
        }
        self._fake_mode = fake_mode_of(self.program.graph)

    def part(self, node: fx.Node, kept_sets: Kept, scale: float = 1.0) -> fx.Node:
        """The part `kept_sets` of what `node` computes, as a node placed before all users of `node`.

        Args:
            node: A weight, a reshape or permute of one, or any tensor that is whole on every lane.
            kept_sets: The part.
            scale: Factor on the values.
        """
        if all(lanes is None for lanes in kept_sets) and scale == 1.0:
            return node
        key = (node, kept_sets, scale)
        if key not in self._nodes_by_key:
            self._nodes_by_key[key] = self._make(node, kept_sets, scale)
        return self._nodes_by_key[key]

    def _make(self, node: fx.Node, kept_sets: Kept, scale: float) -> fx.Node:
        if scale != 1.0 and self._rounds(node):
            return self._insert(aten.mul.Tensor, (self.part(node, kept_sets), scale))
        if node.name in self.program.weights:
            return self._weight(node, kept_sets, scale)
        if node.target is DEQUANTIZE and self._is_cut_between_groups(node, kept_sets[1]):
            return self._dequantize_part(node, kept_sets, scale)
        if node.target is aten.permute.default:
            inner: list[KeptDim] = [None] * len(kept_sets)
            for dim, source in enumerate(args_of(node)[1]):
                inner[source] = kept_sets[dim]
            part = self.part(args_of(node)[0], tuple(inner), scale)
            return self._insert(aten.permute.default, (part, args_of(node)[1]))
        if node.target is aten.reshape.default and (inner_kept := self._before_reshape(node, kept_sets)) is not None:
            part = self.part(args_of(node)[0], inner_kept, scale)
            # The largest part: smaller ones are padded to it.
            sizes = [
                max(map(size, lanes)) if lanes else whole for whole, lanes in zip(self.shapes[node.name], kept_sets)
            ]
            return self._insert(aten.reshape.default, (part, sizes))
        if (origin := operand_part(node, kept_sets, self.shapes)) is not None:
            part = self.part(origin.operand, origin.kept_sets, scale)
            return part if origin.target is None else self._insert(origin.target, (part, *origin.rest), origin.kwargs)
        part = node
        for dim, lanes in enumerate(kept_sets):
            if lanes is not None:
                part = self._select(part, dim, lanes, self.shapes[node.name])
        if scale != 1.0:
            part = self._insert(aten.mul.Tensor, (part, scale))
        return part

    def _rounds(self, node: fx.Node) -> bool:
        """True if a factor must come after `node`, for it holds whole numbers or makes coarser ones of its operand."""
        if node.name in self.program.weights:
            return not self.program.weights[node.name].torch_dtype.is_floating_point
        return node.target in CASTS

    def _select(self, node: fx.Node, dim: int, lanes: tuple[IndexSet, ...], shape: tuple[Any, ...]) -> fx.Node:
        """The positions that each lane keeps of one dim of a tensor that is whole on every lane.

        Like `WeightSpec.take`, a lane that keeps fewer than others is padded with zeros at the end. They are picked as
        any other position: a product with 0 is not 0 where a value is infinite.
        """
        whole = int(shape[dim])
        if len(lanes[0]) == 1 and len(set(lanes)) == 1:
            return self._insert(aten.slice.Tensor, (node, dim, *lanes[0][0]))
        if len(set(map(size, lanes))) == 1:
            index = self._lane_index(lanes, f"kraken.positions.{whole}", torch.arange(whole))
            return self._insert(aten.index_select.default, (node, dim, index))
        # The constant is padded with zeros too, so position 0 is where the zero must lie.
        behind = [0, 0] * (len(shape) - 1 - dim)
        padded = self._insert(aten.constant_pad_nd.default, (node, [*behind, 1, 0]))
        index = self._lane_index(lanes, f"kraken.positions_after_zero.{whole}", torch.arange(1, whole + 1))
        return self._insert(aten.index_select.default, (padded, dim, index))

    def _is_cut_between_groups(self, node: fx.Node, columns: KeptDim) -> bool:
        unit = grain_of(node)
        return all(start % unit == stop % unit == 0 for lane in columns or () for start, stop in lane)

    def _dequantize_part(self, node: fx.Node, kept_sets: Kept, scale: float) -> fx.Node:
        """Cut integers, scales and zero points alike; what a lane is padded with has a scale of 0."""
        data, scales, zero_points, bits, dtype = args_of(node)
        rows, columns = kept_sets
        whole, groups = int(self.shapes[node.name][1]), int(self.shapes[scales.name][1])
        data_columns = None if columns is None else tuple(in_units(lane, 8 // bits) for lane in columns)
        of_groups = None
        if columns is not None and groups > 1:
            of_groups = tuple(in_units(lane, whole // groups) for lane in columns)
        part = self.part(data, (rows, data_columns))
        part_scales = self.part(scales, (rows, of_groups), scale)
        part_zeros = self.part(zero_points, (rows, of_groups)) if zero_points is not None else None
        # Where the whole was: computed earlier, all weights of a model would be there at once.
        with node.graph.inserting_before(node):
            weight = node.graph.call_function(DEQUANTIZE, (part, part_scales, part_zeros, bits, dtype))
        weight.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        return weight

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        """A call placed as early as its operands allow, so that every later user of the same part can read it."""
        computed_args = [arg for arg in args if isinstance(arg, fx.Node) and arg.op != "placeholder"]
        graph = self.program.graph
        if computed_args:
            assert len(computed_args) == 1
            with graph.inserting_after(computed_args[0]):
                return graph.call_function(target, args, dict(kwargs or {}))
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            return graph.call_function(target, args, dict(kwargs or {}))

    def _weight(self, node: fx.Node, kept_sets: Kept, scale: float) -> fx.Node:
        spec = self.program.weights[node.name]
        shards = tuple(shard for dim, lanes in enumerate(kept_sets) if (shard := _cut(spec, dim, lanes)) is not None)
        return self.add_weight(replace(spec, shards=shards, scale=scale), near=node)

    def add_weight(self, spec: WeightSpec, near: fx.Node | None = None) -> fx.Node:
        """A placeholder for a new row of the weight table."""
        graph = self.program.graph
        key = _row(spec)
        if key in self._nodes_by_key:
            return self._nodes_by_key[key]
        first = near if near is not None else next(iter(graph.nodes))
        with graph.inserting_before(first):
            placeholder = graph.placeholder(f"{spec.name}_lane" if near is not None else spec.name)
        placeholder.target = placeholder.name  # the name of the argument, which others of this weight have too
        with self._fake_mode:
            placeholder.meta["val"] = torch.empty(spec.shape, dtype=spec.torch_dtype)
        self.program.weights[placeholder.name] = replace(spec, name=placeholder.name)
        self._nodes_by_key[key] = placeholder
        return placeholder

    def add_constant(self, source: str, value: Tensor, shards: tuple[DimShard, ...] = ()) -> fx.Node:
        """A placeholder for a tensor that the compiler made up."""
        self.program.constants[source] = value
        dtype = str(value.dtype).removeprefix("torch.")
        name = re.sub(r"\W+", "_", source).strip("_")
        return self.add_weight(WeightSpec(name, source, tuple(value.shape), dtype, "constant", shards))

    def _lane_index(self, lanes: tuple[IndexSet, ...], source: str, positions: Tensor) -> fx.Node:
        """The positions each lane keeps, as a weight of whole numbers."""
        return self.add_constant(source, positions, (DimShard(0, lanes),))

    def _before_reshape(self, node: fx.Node, kept_sets: Kept) -> Kept | None:
        """Kept sets of a reshape's operand, group of dims by group of dims; None if they are no product."""
        operand = args_of(node)[0]
        before, after = self.shapes[operand.name], self.shapes[node.name]
        if not all(isinstance(length, int) for length in (*before, *after)):
            return None
        inner: list[KeptDim] = [None] * len(before)
        for source, target in _groups(before, after):
            if all(kept_sets[dim] is None for dim in target):
                continue
            lanes = [_unravel(lane, kept_sets, source, target, before, after) for lane in range(self._lanes(kept_sets))]
            if any(lane is None for lane in lanes):
                return None
            for place, dim in enumerate(source):
                sets = tuple(lane[place] for lane in lanes if lane is not None)
                inner[dim] = None if all(one == ((0, before[dim]),) for one in sets) else sets
        return tuple(inner)

    def _lanes(self, kept_sets: Kept) -> int:
        return next(len(lanes) for lanes in kept_sets if lanes is not None)


def _row(spec: WeightSpec) -> tuple[str, tuple[DimShard, ...], float]:
    return spec.source, spec.shards, spec.scale


def _cut(spec: WeightSpec, dim: int, lanes: KeptDim) -> DimShard | None:
    """The part that lanes keep of one dim of a weight, which may be a part of its source itself."""
    shard = next((shard for shard in spec.shards if shard.dim == dim), None)
    if shard is None or lanes is None:
        return shard if lanes is None else DimShard(dim, lanes)
    within = zip(map(to_indices, shard.lanes), map(to_indices, lanes))
    return DimShard(dim, tuple(from_indices(whole[place] for place in positions) for whole, positions in within))


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest groups of dims with equal products."""
    groups = []
    left = right = 0
    while left < len(before) and right < len(after):
        source: list[int] = []
        target: list[int] = []
        product_before = product_after = 1
        while not source or not target or product_before != product_after:
            if not target or (product_before >= product_after and source and right < len(after)):
                target.append(right)
                product_after *= after[right]
                right += 1
            else:
                source.append(left)
                product_before *= before[left]
                left += 1
        groups.append((source, target))
    # What is left over on one side are dims of size 1.
    rest = list(range(left, len(before))), list(range(right, len(after)))
    return [*groups[:-1], *((source + rest[0], target + rest[1]) for source, target in groups[-1:])]


def _unravel(
    lane: int, kept_sets: Kept, source: list[int], target: list[int], before: tuple[int, ...], after: tuple[int, ...]
) -> list[IndexSet] | None:
    """The positions a lane keeps of the dims `source`, given those of the dims `target` they were reshaped to."""
    mask = torch.ones([after[dim] for dim in target], dtype=torch.bool)
    for place, dim in enumerate(target):
        lanes = kept_sets[dim]
        if lanes is not None:
            line = torch.zeros(after[dim], dtype=torch.bool)
            line[to_indices(lanes[lane])] = True
            mask &= line.reshape([-1 if other == place else 1 for other in range(len(target))])
    mask = mask.reshape([before[dim] for dim in source])
    sets = []
    for place in range(len(source)):
        others = [other for other in range(len(source)) if other != place]
        line = mask.any(dim=others) if others else mask
        sets.append(from_indices(torch.nonzero(line).flatten().tolist()))
    return sets if math.prod(map(size, sets)) == int(mask.sum()) else None


def weight_kept(rank: int, dim: int, lanes: tuple[IndexSet, ...], whole: int) -> Kept:
    """Kept sets of a tensor that is split on one dim only; nothing is split if every lane keeps all of it."""
    sets: list[KeptDim] = [None] * rank
    if any(lane != ((0, whole),) for lane in lanes):
        sets[dim] = lanes
    return tuple(sets)


def original_shapes(program: Program) -> dict[str, tuple[Any, ...]]:
    """Shapes of all tensors, by node name."""
    return {node.name: shape_of(node) for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
