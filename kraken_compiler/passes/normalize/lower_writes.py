"""Write in-place writes, which capture leaves as copies and scatters, as concatenations and choices.

    %a = slice_scatter(%o, %x, -1, 0, 4)             ->     %b = cat([%x, %y], -1)
    %b = slice_scatter(%a, %y, -1, 4, MAX)
    %c = slice_scatter(%c, %x, -1, 0, MAX, 2)        ->     (the same between every two elements)
    %m = index_put(%x, [%mask], %value)              ->     %m = where(%mask, %value, %x)
    %y = copy(%x, %z)                                ->     %y = expand(to(%z, dtype of %x), shape of %x)

Then what was there before, often memory that nobody has set, is read only where something of it is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler._torch_compat import FakeTensorMode
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, replace
from kraken_compiler.passes.shapes import compute_shape, fake_mode_of, same_shape, same_size, shape_of, value_of

_WRITES = (
    *(aten.copy.default, aten.fill.Scalar, aten.fill.Tensor, aten.zero.default),
    *(aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default),
)


@dataclass(frozen=True)
class LowerWrites(Pass[Program]):
    name: ClassVar[str] = "lower-writes"

    def run(self, program: Program) -> PassResult:
        mode = fake_mode_of(program.graph)
        writes: dict[fx.Node, tuple[Any, fx.Node]] = {}
        matches = sum(_Write(node, mode, writes).lower() for node in calls(program.graph, *_WRITES))
        return PassResult(
            matches + sum(_Write(node, mode, writes).read() for node in calls(program.graph, aten.slice.Tensor))
        )


@dataclass
class _Write:
    """One write, or a read of what was written; what replaces it stands before it.

    Attributes:
        node: The operator.
        mode: The mode of the graph's fake tensors.
        writes: By concatenation that replaced a write, the part of it that was written, and what stands there.
    """

    node: fx.Node
    mode: FakeTensorMode
    writes: dict[fx.Node, tuple[Any, fx.Node]]

    def lower(self) -> bool:
        node, target = self.node, self.node.target
        new: fx.Node | None
        if target in (aten.copy.default, aten.fill.Scalar, aten.fill.Tensor):
            new = self._fill(*args_of(node)[:2])
        elif target is aten.zero.default:
            new = self._fill(args_of(node)[0], 0)
        elif target is aten.index_put.default:
            into, indices, value = args_of(node)[:3]
            new = self._choose(into, indices, value, bool(argument(node, 3, "accumulate", False)))
        elif target is aten.select_scatter.default:
            into, source, dim, index = args_of(node)[:4]
            new = self._select(into, source, int(dim) % len(shape_of(node)), index)
        else:
            into, source = args_of(node)[:2]
            dim = int(argument(node, 2, "dim", 0)) % len(shape_of(node))
            start, end, step = argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)
            new = self._scatter(into, source, dim, start, end, step)
        if new is None:
            return False
        replace(node, new)
        return True

    def read(self) -> bool:
        """A slice of a concatenation becomes what stands there: what was overwritten has no readers then."""
        node = self.node
        into, dim = args_of(node)[0], int(argument(node, 1, "dim", 0)) % len(shape_of(node))
        part = _part(dim, *(argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step"))))
        if into in self.writes and self.writes[into][0] == part:
            self._read_as(self.writes[into][1])
            return True
        whole = into.target is aten.cat.default and int(argument(into, 1, "dim", 0)) % len(shape_of(into)) == dim
        size = shape_of(into)[dim]
        bounds = (argument(node, 2, "start"), argument(node, 3, "end"))
        if not whole or not isinstance(size, int) or argument(node, 4, "step", 1) != 1:
            return False
        if any(isinstance(bound, fx.Node) for bound in bounds):
            return False
        pieces = _pieces(into, dim, *slice(*bounds).indices(size)[:2])
        if not pieces:
            return False
        replace(node, self._call(aten.cat.default, pieces, dim)) if len(pieces) > 1 else self._read_as(pieces[0])
        return True

    def _read_as(self, piece: fx.Node) -> None:
        self.node.replace_all_uses_with(piece)
        self.node.graph.erase_node(self.node)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            new = self.node.graph.call_function(target, args, kwargs)
        new.meta["nn_module_stack"] = self.node.meta.get("nn_module_stack", {})
        return compute_shape(new, self.mode)

    def _cast(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        return source if value_of(source).dtype == dtype else self._call(aten.to.dtype, source, dtype)

    def _fill(self, into: fx.Node, source: fx.Node | float) -> fx.Node:
        """Overwrite everything of `into` with `source`, broadcast."""
        if not isinstance(source, fx.Node):
            return self._call(aten.full_like.default, into, source)
        source = self._cast(source, value_of(into).dtype)
        return source if same_shape(source, into) else self._call(aten.expand.default, source, self._sizes(into))

    def _sizes(self, node: fx.Node) -> list[Any]:
        return [
            size if isinstance(size, int) else self._call(aten.sym_size.int, node, dim)
            for dim, size in enumerate(shape_of(node))
        ]

    def _choose(self, into: fx.Node, indices: list[Any], value: fx.Node, accumulate: bool) -> fx.Node | None:
        """Write one value, or one for every place of the dims behind the mask's, wherever the mask is true."""
        *before, mask = indices
        if accumulate or any(index is not None for index in before) or value_of(mask).dtype != torch.bool:
            return None
        behind = len(shape_of(into)) - len(before) - len(shape_of(mask))
        if len(shape_of(value)) > behind and value_of(value).numel() != 1:
            return None
        for _ in range(behind):
            mask = self._call(aten.unsqueeze.default, mask, -1)
        if len(shape_of(value)) > len(shape_of(into)):
            value = self._call(aten.reshape.default, value, [])
        return self._call(aten.where.self, mask, self._cast(value, value_of(into).dtype), into)

    def _select(self, into: fx.Node, source: fx.Node, dim: int, index: Any) -> fx.Node | None:
        size = shape_of(into)[dim]
        if not isinstance(index, int) or (index < 0 and not isinstance(size, int)):
            return None
        index = index % int(size) if index < 0 else index
        return self._scatter(into, self._call(aten.unsqueeze.default, source, dim), dim, index, index + 1, 1)

    def _scatter(self, into: fx.Node, source: fx.Node, dim: int, start: Any, end: Any, step: Any) -> fx.Node | None:
        size = shape_of(into)[dim]
        source = self._cast(source, value_of(into).dtype)
        if same_shape(source, into):
            return source
        if isinstance(size, int) and step != 1:
            return self._scatter_strided(into, source, dim, int(start or 0), end, step)
        if step != 1:
            return None
        part = _part(dim, start, end, step)
        if isinstance(size, int) and all(bound is None or isinstance(bound, int) for bound in (start, end)):
            start, end, _ = slice(start, end).indices(size)
            if start >= end:
                return into  # nothing is written
            stop = end >= size
        else:
            stop = end is None or (isinstance(end, int) and end >= _NO_END)
        pieces = [] if start in (None, 0) else [self._slice(into, dim, 0, start)]
        pieces += [source]
        pieces += [] if stop else [self._slice(into, dim, end, None)]
        new = self._call(aten.cat.default, pieces, dim)
        self.writes[new] = (part, source)
        return new

    def _scatter_strided(
        self, into: fx.Node, source: fx.Node, dim: int, start: int, end: Any, step: int
    ) -> fx.Node | None:
        """Write every `step`-th element of all: a column of a table with `step` columns."""
        shape = self._sizes(into)
        size = int(shape[dim])
        column = slice(start, end).indices(size)[0]
        if size % step or column >= step or not same_size(shape_of(source)[dim], size // step):
            return None
        table = self._call(aten.reshape.default, into, [*shape[:dim], size // step, step, *shape[dim + 1 :]])
        # What was written before, by the same rule, is read from there.
        previous_table = args_of(into)[0] if into.target is aten.reshape.default else None
        if isinstance(previous_table, fx.Node) and same_shape(previous_table, table):
            table = previous_table
        scatter = self._scatter(
            table, self._call(aten.unsqueeze.default, source, dim + 1), dim + 1, column, column + 1, 1
        )
        return None if scatter is None else self._call(aten.reshape.default, scatter, shape)

    def _slice(self, node: fx.Node, dim: int, start: Any, end: Any) -> fx.Node:
        """A slice, taken from the operands of a concatenation where it ends between them."""
        if node.target is aten.cat.default and int(argument(node, 1, "dim", 0)) % len(shape_of(node)) == dim:
            pieces = _pieces(node, dim, start, end)
            if pieces:
                return pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, dim)
        return self._call(aten.slice.Tensor, node, dim, start, 2**63 - 1 if end is None else end)


def _part(dim: int, start: Any, end: Any, step: Any) -> tuple[Any, ...]:
    """One spelling of a slice."""
    return dim, start or 0, None if isinstance(end, int) and end >= _NO_END else end, step or 1


_NO_END = 2**62


def _pieces(cat: fx.Node, dim: int, start: Any, end: Any) -> list[fx.Node]:
    """The operands of a concatenation that make up a slice of it; none if they do not."""
    pieces, place, stop = [], 0, 2**63 if end is None else end
    if not isinstance(start, int) or not isinstance(stop, int):
        return []
    for operand in args_of(cat)[0]:
        length = shape_of(operand)[dim]
        if not isinstance(length, int):
            return []
        if place >= start and place + length <= stop:
            pieces.append(operand)
        elif place + length > start and place < stop:
            return []
        place += length
    return pieces
