"""One spelling for each layout change: every view is a `reshape`, every transposition a `permute`, chains are merged.

    %a = view(%x, [b, s, 4, 8])                      ->     %p = permute(%r, [0, 2, 1, 3])   of   %r = reshape(%x, ...)
    %t = transpose(%a, 1, 2)
    %q = squeeze(unsqueeze(%t, 1), 1)                ->     (users of %q read %t)
    %n = narrow(%x, -1, 8, 16)                       ->     %n = slice(%x, -1, 8, 24)
    %k = getitem(tensor_split(%x, [8], -1), 1)       ->     %k = slice(%x, -1, 8, 24)
    %d = div(%x, expand_as(%m, %x))                  ->     %d = div(%x, %m)

`reshape` and not `view`, because a lane's tensors, and tensors batched over lanes, need not be contiguous.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, replace
from kraken_compiler.passes.shapes import is_tensor, same_shape, shape_of

_RESHAPE = aten.reshape.default
_PERMUTE = aten.permute.default


@dataclass(frozen=True)
class CanonicalizeLayout(Pass[Program]):
    name: ClassVar[str] = "canonicalize-layout"

    def run(self, program: Program) -> PassResult:
        matches = 0
        for node in calls(program.graph, aten.view.default, aten._unsafe_view.default):
            node.target = _RESHAPE
            matches += 1
        for node in calls(program.graph, *_UNSAFE):
            node.target = _UNSAFE[node.target]
            matches += 1
        for node in calls(program.graph, aten.view_as.default, aten.reshape_as.default):
            _resize(node)
            matches += 1
        for node in list(program.graph.nodes):
            permutation = _permutation(node) if node.op == "call_function" else None
            if permutation is not None and node.target is not _PERMUTE:
                with program.graph.inserting_before(node):
                    replace(node, program.graph.call_function(_PERMUTE, (args_of(node)[0], permutation)))
                matches += 1
        matches += sum(_drop_squeeze(node) for node in calls(program.graph, aten.squeeze.dim))
        matches += sum(_cut_out(node) for node in calls(program.graph, aten.narrow.default))
        matches += sum(_cut_up(node) for node in calls(program.graph, *_TENSOR_SPLITS))
        matches += sum(_broadcast(node) for node in calls(program.graph, aten.expand_as.default))
        return PassResult(matches + sum(_merge(node) for node in calls(program.graph, _RESHAPE, _PERMUTE)))


def _permutation(node: fx.Node) -> list[int] | None:
    """The dims of a permutation, non-negative, or None if `node` is something else."""
    rank = len(shape_of(node)) if node.target in _TRANSPOSITIONS else 0
    dims = list(range(rank))
    if node.target in (aten.t.default, aten.numpy_T.default):
        return dims[::-1]
    if node.target is aten.mT.default:
        return [*dims[:-2], rank - 1, rank - 2]
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        first, second = (int(dim) % rank for dim in args_of(node)[1:3])
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    if node.target is _PERMUTE:
        return [int(dim) % rank for dim in args_of(node)[1]]
    if node.target in _MOVES:
        dim_lists = args_of(node)[1:3]
        source, target = ([dim] if isinstance(dim, int) else list(dim) for dim in dim_lists)
        places = dict(zip((dim % rank for dim in target), (dim % rank for dim in source)))
        rest = iter(dim for dim in dims if dim not in places.values())
        return [places[dim] if dim in places else next(rest) for dim in dims]
    return None


_MOVES = (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
_TRANSPOSITIONS = frozenset(
    {
        *_MOVES,
        aten.swapdims.default,
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
        aten.swapaxes.default,
        _PERMUTE,
    }
)


def _merge(node: fx.Node) -> bool:
    """Merge `node` with an operand of its own kind, or drop it if nothing changes."""
    operand = args_of(node)[0]
    assert isinstance(operand, fx.Node)
    is_merged = False
    while operand.target is node.target:
        if node.target is _PERMUTE:
            inner, outer = _permutation(operand), _permutation(node)
            assert inner is not None
            assert outer is not None
            node.args = (args_of(operand)[0], [inner[dim] for dim in outer])
        else:
            node.args = (args_of(operand)[0], argument(node, 1, "shape"))
        operand = args_of(node)[0]
        is_merged = True
    if node.target is _PERMUTE:
        is_identity = _permutation(node) == list(range(len(shape_of(node))))
    else:
        is_identity = same_shape(node, operand)
    if is_identity:
        node.replace_all_uses_with(operand)
        node.graph.erase_node(node)
    return is_merged or is_identity


def _drop_squeeze(node: fx.Node) -> bool:
    """Drop a squeeze of what was unsqueezed; in-place writes through a squeezed view leave such pairs."""
    operand = args_of(node)[0]
    assert isinstance(operand, fx.Node)
    if operand.target is not aten.unsqueeze.default:
        return False
    rank = len(shape_of(operand))
    if int(args_of(operand)[1]) % rank != int(args_of(node)[1]) % rank:
        return False
    node.replace_all_uses_with(args_of(operand)[0])
    node.graph.erase_node(node)
    return True


_UNSAFE: dict[Any, Any] = {
    aten.unsafe_chunk.default: aten.chunk.default,
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
"""Operators whose results must not be written to, which nothing in a graph does."""


def _resize(node: fx.Node) -> None:
    """Rewrite a view of another tensor's shape as a reshape to sizes that are read from that."""
    operand, like = args_of(node)
    sizes: list[int | fx.Node] = []
    with node.graph.inserting_before(node):
        for dim, size in enumerate(shape_of(node)):
            if isinstance(size, int):
                sizes.append(size)
                continue
            size_node = node.graph.call_function(aten.sym_size.int, (like, dim))
            size_node.meta["val"] = size
            sizes.append(size_node)
        replace(node, node.graph.call_function(_RESHAPE, (operand, sizes)))


def _cut_out(node: fx.Node) -> bool:
    """Rewrite a `narrow` between fixed places as the slice that it is."""
    operand, dim, start, length = args_of(node)
    if not isinstance(start, int) or not isinstance(length, int) or isinstance(shape_of(operand)[dim], torch.SymInt):
        return False
    start %= shape_of(operand)[dim]
    with node.graph.inserting_before(node):
        replace(node, node.graph.call_function(aten.slice.Tensor, (operand, dim, start, start + length)))
    return True


_TENSOR_SPLITS = (aten.tensor_split.indices, aten.tensor_split.sections)


def _cut_up(node: fx.Node) -> bool:
    """Rewrite the pieces of a `tensor_split` of a fixed size as the slices that they are."""
    operand, sections, dim = args_of(node)[0], args_of(node)[1], int(argument(node, 2, "dim", 0))
    whole = shape_of(operand)[dim]
    if not isinstance(whole, int) or not all(user.target is operator.getitem for user in node.users):
        return False
    ends = [0, *_ends(sections, whole), whole]
    for piece in list(node.users):
        start, stop, _ = slice(*list(itertools.pairwise(ends))[args_of(piece)[1]]).indices(whole)
        with node.graph.inserting_before(piece):
            replace(piece, node.graph.call_function(aten.slice.Tensor, (operand, dim, start, max(start, stop))))
    node.graph.erase_node(node)
    return True


def _ends(sections: int | Iterable[int], whole: int) -> list[int]:
    """The ends of all pieces but the last; of a number of pieces, the first ones are one longer."""
    if not isinstance(sections, int):
        return list(sections)
    length, longer = divmod(whole, sections)
    return list(itertools.accumulate(length + (piece < longer) for piece in range(sections - 1)))


_ELEMENTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


def _broadcast(node: fx.Node) -> bool:
    """Leave out an `expand_as` where what reads it broadcasts by itself to the same shape."""
    operand, matches = args_of(node)[0], 0
    for user in list(node.users):
        others = [other for other in user.all_input_nodes if other is not node and is_tensor(other)]
        if user.target in _ELEMENTWISE and any(same_shape(other, user) for other in others):
            user.replace_input_with(node, operand)
            matches += 1
    if not node.users:
        node.graph.erase_node(node)
    return bool(matches)
