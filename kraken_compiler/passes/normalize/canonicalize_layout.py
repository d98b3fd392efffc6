"""One spelling for each layout change: every view is a `reshape`, every transposition a `permute`, chains are merged.

    %a = view(%x, [b, s, 4, 8])                      ->     %p = permute(%r, [0, 2, 1, 3])   of   %r = reshape(%x, ...)
    %t = transpose(%a, 1, 2)
    %q = squeeze(unsqueeze(%t, 1), 1)                ->     (users of %q read %t)

`reshape` and not `view`, because a lane's tensors, and tensors batched over lanes, need not be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.base import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, replace
from kraken_compiler.passes.shapes import same_shape, shape_of

_RESHAPE = aten.reshape.default
_PERMUTE = aten.permute.default


@dataclass(frozen=True)
class CanonicalizeLayout(Pass):
    name: ClassVar[str] = "canonicalize-layout"

    def run(self, program: Program) -> PassResult:
        matches = 0
        for node in calls(program.graph, aten.view.default, aten._unsafe_view.default):
            node.target = _RESHAPE
            matches += 1
        for node in list(program.graph.nodes):
            permutation = _permutation(node) if node.op == "call_function" else None
            if permutation is not None and node.target is not _PERMUTE:
                with program.graph.inserting_before(node):
                    replace(node, program.graph.call_function(_PERMUTE, (args_of(node)[0], permutation)))
                matches += 1
        matches += sum(_undone(node) for node in calls(program.graph, aten.squeeze.dim))
        return PassResult(matches + sum(_merge(node) for node in calls(program.graph, _RESHAPE, _PERMUTE)))


def _permutation(node: fx.Node) -> list[int] | None:
    """The dims of a permutation, non-negative, or None if `node` is something else."""
    rank = len(shape_of(node)) if node.target in _TRANSPOSITIONS else 0
    dims = list(range(rank))
    if node.target in (aten.t.default, aten.numpy_T.default):
        return dims[::-1]
    if node.target is aten.mT.default:
        return [*dims[:-2], rank - 1, rank - 2]
    if node.target in (aten.transpose.int, aten.swapaxes.default):
        first, second = (int(dim) % rank for dim in args_of(node)[1:3])
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    if node.target is _PERMUTE:
        return [int(dim) % rank for dim in args_of(node)[1]]
    return None


_TRANSPOSITIONS = frozenset(
    {
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
    merged = False
    while operand.target is node.target:
        if node.target is _PERMUTE:
            inner, outer = _permutation(operand), _permutation(node)
            assert inner is not None
            assert outer is not None
            node.args = (args_of(operand)[0], [inner[dim] for dim in outer])
        else:
            node.args = (args_of(operand)[0], argument(node, 1, "shape"))
        operand = args_of(node)[0]
        merged = True
    if node.target is _PERMUTE:
        identity = _permutation(node) == list(range(len(shape_of(node))))
    else:
        identity = same_shape(node, operand)
    if identity:
        node.replace_all_uses_with(operand)
        node.graph.erase_node(node)
    return merged or identity


def _undone(node: fx.Node) -> bool:
    """Drop a squeeze of what was unsqueezed; whoever writes in place through a squeezed view leaves such pairs."""
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
