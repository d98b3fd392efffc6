"""Keep heads in a dim of their own where a model merges them with the batch or merges batch and sequence.

nn.MultiheadAttention, and what follows it, spells

    %a = reshape(%q, [s, b*8, 8])                    ->     %a = reshape(%q, [s, b, 8, 8])
    %t = permute(%a, [1, 0, 2])                             %y = permute(%a, [1, 2, 0, 3])
    %y = reshape(%t, [b, 8, s, 8])

    %f = reshape(%m, [s*b, 64])                      ->     %f = reshape(%m, [s, b, 64])
    %o = reshape(linear(%f, %w), [s, b, 64])                %o = linear(%f, %w)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, replace
from kraken_compiler.passes.shapes import refresh_shapes, same_size, shape_of

_RESHAPE = aten.reshape.default
_PERMUTE = aten.permute.default


@dataclass(frozen=True)
class SeparateHeads(Pass[Program]):
    name: ClassVar[str] = "separate-heads"

    def run(self, program: Program) -> PassResult:
        matches = 0
        for node in calls(program.graph, _RESHAPE):
            if _heads_from_batch(node) or _tokens_before_linear(node):
                refresh_shapes(program.graph)
                matches += 1
        return PassResult(matches)


def _heads_from_batch(out: fx.Node) -> bool:
    permutation = args_of(out)[0]
    merge = (
        args_of(permutation)[0]
        if permutation.target is _PERMUTE and list(args_of(permutation)[1]) == [1, 0, 2]
        else None
    )
    if merge is None or merge.target is not _RESHAPE:
        return False
    x = args_of(merge)[0]
    whole, before, after = shape_of(x), shape_of(merge), shape_of(out)
    if len(whole) != 3 or len(after) != 4 or not all(isinstance(size, int) for size in (whole[2], *after[1::2])):
        return False
    same = ((whole[0], before[0]), (whole[0], after[2]), (whole[1], after[0]), (before[2], after[3]))
    if not all(same_size(left, right) for left, right in same) or after[1] * after[3] != whole[2]:
        return False
    batch, heads, sequence, width = argument(out, 1, "shape")
    sizes = _sizes((sequence, batch, heads, width))
    if sizes is None:
        return False
    with out.graph.inserting_before(out):
        heads_apart = out.graph.call_function(_RESHAPE, (x, sizes))
        replace(out, out.graph.call_function(_PERMUTE, (heads_apart, [1, 2, 0, 3])))
    return True


def _tokens_before_linear(out: fx.Node) -> bool:
    linear = args_of(out)[0]
    if linear.target is not LINEAR or len(linear.users) != 1:
        return False
    flat = args_of(linear)[0]
    if not isinstance(flat, fx.Node) or flat.target is not _RESHAPE:
        return False
    heads, after = shape_of(args_of(flat)[0]), shape_of(out)
    if len(heads) != 4 or len(after) != 3 or len(shape_of(flat)) != 2:
        return False
    if not all(same_size(left, right) for left, right in zip(heads[:2], after[:2])):
        return False
    if not same_size(shape_of(flat)[1], heads[2] * heads[3]) or not same_size(after[2], shape_of(linear)[1]):
        return False
    sizes = _sizes((*argument(out, 1, "shape")[:2], shape_of(flat)[1]))
    if sizes is None:
        return False
    with out.graph.inserting_before(out):
        tokens = out.graph.call_function(_RESHAPE, (args_of(flat)[0], sizes))
        new = out.graph.call_function(LINEAR, (tokens, *args_of(linear)[1:]), dict(linear.kwargs))
        new.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
        replace(out, new)
    return True


def _sizes(sizes: tuple[Any, ...]) -> list[Any] | None:
    """Sizes for a reshape, of which at most one may be left open."""
    return list(sizes) if sum(isinstance(size, int) and size == -1 for size in sizes) <= 1 else None
