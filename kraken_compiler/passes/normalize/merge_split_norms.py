"""Write norms that were split off head by head, each with its own weights, as one norm of all heads.

    %s = split(%q, 1, 1)                             ->     %n = layer_norm(%q, [d])
    %y = cat([layer_norm(%s[0], [d], %w0),                  %y = mul(%n, reshape(stack([%w0, %w1]), [2, 1, d]))
              layer_norm(%s[1], [d], %w1)], 1)

A lane program is the same on every lane, so heads must differ by data and not by nodes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, near_miss, replace
from kraken_compiler.passes.shapes import shape_of


@dataclass(frozen=True)
class MergeSplitNorms(Pass[Program]):
    name: ClassVar[str] = "merge-split-norms"

    def run(self, program: Program) -> PassResult:
        return PassResult.of(_merge(node) for node in calls(program.graph, aten.cat.default))


def _merge(cat: fx.Node) -> bool | Rejection:
    norms: list[Any] = list(args_of(cat)[0])
    dim = int(argument(cat, 1, "dim", 0)) % len(shape_of(cat))
    first = norms[0]
    if first.target not in (aten.layer_norm.default, aten.rms_norm.default) or dim >= len(shape_of(cat)) - 1:
        return False
    source = _split_source(first, 0, dim)
    if source is None or shape_of(source)[dim] != len(norms):
        return near_miss("norms are put together that are not those of all heads of one tensor", cat)
    for place, norm in enumerate(norms):
        if _signature(norm) != _signature(first):
            return near_miss("the norms of the heads differ in more than their weights", norm)
        if _split_source(norm, place, dim) is not source:
            return near_miss("the norms of the heads are put together in another order", norm)
    graph = cat.graph
    is_layer_norm = first.target is aten.layer_norm.default
    with graph.inserting_before(cat):
        rest = (None, None, *args_of(first)[4:]) if is_layer_norm else (None, *args_of(first)[3:])
        new = graph.call_function(first.target, (source, args_of(first)[1], *rest))
        for position, combine in ((2, aten.mul.Tensor), (3, aten.add.Tensor)):
            weights = [argument(norm, position, "weight" if position == 2 else "bias") for norm in norms]
            if (position == 3 and not is_layer_norm) or any(weight is None for weight in weights):
                continue
            stack = graph.call_function(aten.stack.default, (weights,))
            sizes = [len(norms), *[1] * (len(shape_of(cat)) - dim - 2), shape_of(cat)[-1]]
            new = graph.call_function(combine, (new, graph.call_function(aten.reshape.default, (stack, sizes))))
    replace(cat, new)
    return True


def _signature(norm: fx.Node) -> tuple[Any, ...]:
    """The key that norms which can be merged share: everything but their operands' values."""
    return (norm.target, *(type(value) if isinstance(value, fx.Node) else value for value in args_of(norm)[1:]))


def _split_source(norm: fx.Node, place: int, dim: int) -> fx.Node | None:
    """The tensor of which `norm` reads slice number `place` along `dim`, if it does."""
    item = args_of(norm)[0]
    if not isinstance(item, fx.Node) or item.target is not operator.getitem or args_of(item)[1] != place:
        return None
    split = args_of(item)[0]
    assert isinstance(split, fx.Node)
    if split.target is not aten.split.Tensor or args_of(split)[1] != 1:
        return None
    source = args_of(split)[0]
    assert isinstance(source, fx.Node)
    return source if int(argument(split, 2, "dim", 0)) % len(shape_of(source)) == dim else None
