"""Give attention and FFN projections of their own where they share a matrix, as in parallel blocks that are fused.

%y = linear(%x, %w)                                    %a = linear(%x, slice(%w, 0, 0, 192))
%a, %f = split(%y, [192, 96], -1)              ->      %f = linear(%x, slice(%w, 0, 192, 288))
%o = linear(cat([%heads, gelu(%f)], -1), %v)           %o = linear(%heads, slice(%v, 1, 0, 64))
                                                            + linear(gelu(%f), slice(%v, 1, 64, 160))

The two are then branches of their own: attention is divided by heads, the FFN by columns. A factor of a sum of
projections, as of routed and shared experts, becomes one of its terms for the same reason: a branch ends in a sum.

%r = add(%x, mul(add(%a, %b), 0.2))            ->      %r = add(%x, add(mul(%a, 0.2), mul(%b, 0.2)))
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import ATTENTIONS, LINEAR, PROJECTIONS
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, replace
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.shapes import compute_shape, fake_mode_of, same_shape, shape_of

_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
_DISTRIBUTIVE = frozenset(
    {
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.neg.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.reshape.default,
        aten.permute.default,
    }
)


@dataclass(frozen=True)
class SeparateParallel(Pass[Program]):
    name: ClassVar[str] = "separate-parallel"

    def run(self, program: Program) -> PassResult:
        weights = weight_derived(program)
        linears = [node for node in calls(program.graph, LINEAR) if args_of(node)[1] in weights]
        outputs = sum(_separate_output(node) for node in linears)
        inputs = sum(_separate_input(node) for node in calls(program.graph, LINEAR) if args_of(node)[1] in weights)
        sums = 0
        while any(_separate_sum(node, weights) for node in calls(program.graph, aten.add.Tensor)):
            sums += 1
        return PassResult(outputs + inputs + sums)


def _nearest(starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The first attentions and projections on every way from `starts`, which may be some themselves."""
    nearest, seen, todo = set[fx.Node](), set[fx.Node](), list(starts)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in ATTENTIONS or node.target in PROJECTIONS:
            nearest.add(node)
        else:
            todo += step(node)
    return nearest


def _sources(node: fx.Node) -> set[fx.Node]:
    """The attentions and projections that `node` is computed from."""
    return _nearest([node], lambda one: one.all_input_nodes)


def _readers(node: fx.Node) -> set[fx.Node]:
    """The attentions and projections that read what `node` computes."""
    return _nearest(node.users, lambda one: one.users)


def _has_attention(nodes: Iterable[fx.Node]) -> bool:
    return any(node.target in ATTENTIONS for node in nodes)


def _separate_output(linear: fx.Node) -> bool:
    """A product for each operand of a concatenation, where some come from an attention and others do not."""
    whole, weight = args_of(linear)[:2]
    if whole.target is not aten.cat.default or len(shape_of(weight)) != 2:
        return False
    parts, rank = args_of(whole)[0], len(shape_of(whole))
    widths = [shape_of(part)[-1] for part in parts]
    is_last = int(argument(whole, 1, "dim", 0)) % rank == rank - 1
    if not is_last or not all(isinstance(width, int) for width in widths):
        return False
    sources = [_sources(part) for part in parts]
    if len({_has_attention(nodes) for nodes in sources}) < 2 or not all(sources):
        return False
    bias, terms = argument(linear, 2, "bias"), list[fx.Node]()
    for part, (start, stop) in zip(parts, _bounds(map(int, widths))):
        with linear.graph.inserting_before(linear):
            columns = _call(linear.graph, aten.slice.Tensor, weight, 1, start, stop)
            terms.append(_call(linear.graph, LINEAR, part, columns, None if terms else bias))
        terms[-1].meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
    _replace_by_sum(linear, terms)
    return True


def _bounds(widths: Iterable[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(widths, initial=0)))


def _replace_by_sum(node: fx.Node, terms: list[fx.Node]) -> None:
    """Put the sum of `terms` in place of `node`, behind the casts and factors that follow: a branch ends in its sum."""
    graph, passed = node.graph, list[fx.Node]()
    while len(node.users) == 1:
        (user,) = node.users
        if not _distributes(user, node):
            break
        with graph.inserting_before(user):
            terms = [_copy(user, node, term) for term in terms]
        passed.append(node)
        node = user
    total = terms[0]
    with graph.inserting_before(node):
        for term in terms[1:]:
            total = _call(graph, aten.add.Tensor, total, term)
    total.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    replace(node, total)
    for unread in reversed(passed):
        graph.erase_node(unread)


def _separate_sum(total: fx.Node, weights: Set[fx.Node]) -> bool:
    """The factors behind a sum of projections, which another sum follows, become factors of its terms."""
    terms = list(args_of(total)[:2])
    if not all(
        isinstance(term, fx.Node) and same_shape(term, total) and _is_projected(term, weights) for term in terms
    ):
        return False
    if argument(total, 2, "alpha", 1) != 1 or not _is_scaled_term(total):
        return False
    _replace_by_sum(total, terms)
    return True


def _is_projected(node: fx.Node, weights: Set[fx.Node]) -> bool:
    """True if a value that is read once is a projection, or a sum of them, behind factors: never the stream itself."""
    if len(node.users) != 1:
        return False
    if node.target in PROJECTIONS:
        return args_of(node)[1] in weights
    if node.target is aten.add.Tensor:
        return all(_is_projected(operand, weights) for operand in node.all_input_nodes)
    is_linear = node.target in _DISTRIBUTIVE or node.target is aten.sum.dim_IntList
    return is_linear and any(_is_projected(operand, weights) for operand in node.all_input_nodes)


def _is_scaled_term(node: fx.Node) -> bool:
    """True if nothing but distributive operators, at least one, stands between a value and the sum that reads it."""
    last = node
    while len(last.users) == 1:
        (user,) = last.users
        if user.target is aten.add.Tensor:
            return last is not node
        if not _distributes(user, last):
            return False
        last = user
    return False


def _distributes(user: fx.Node, operand: fx.Node) -> bool:
    is_divisor = user.target is aten.div.Tensor and args_of(user)[0] is not operand
    return user.target in _DISTRIBUTIVE and args_of(user).count(operand) == 1 and not is_divisor


def _copy(user: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    copy = user.graph.node_copy(user, lambda operand: new if operand is old else operand)
    copy.meta = {"nn_module_stack": user.meta.get("nn_module_stack", {})}
    return compute_shape(copy, fake_mode_of(user.graph))


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return compute_shape(graph.call_function(target, args), fake_mode_of(graph))


def _separate_input(linear: fx.Node) -> bool:
    """A product for each piece that a projection is cut into, where some are an attention's and others an FFN's."""
    pieces = _pieces(linear)
    if len({_is_of_attention(piece) for piece, *_ in pieces}) < 2:
        return False
    x, weight, bias = *args_of(linear)[:2], argument(linear, 2, "bias")
    for piece, start, stop in pieces:
        with linear.graph.inserting_before(linear):
            rows = [
                linear.graph.call_function(aten.slice.Tensor, (whole, 0, start, stop))
                for whole in (weight, bias)
                if whole is not None
            ]
            product = linear.graph.call_function(LINEAR, (x, *rows))
        product.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
        replace(piece, product)
    return True


def _is_of_attention(piece: fx.Node) -> bool:
    """True if an attention reads the piece, at once or through another projection, or what is multiplied with it."""
    readers = _readers(piece)
    return (
        not readers
        or _has_attention(readers)
        or any(_has_attention(_readers(reader) | _sources(args_of(reader)[0])) for reader in readers)
    )


def _pieces(linear: fx.Node) -> list[tuple[fx.Node, int, int]]:
    """The pieces of a projection's columns: nodes, first columns and ends; empty if it is also read otherwise."""
    rank, width = len(shape_of(linear)), int(shape_of(linear)[-1])
    pieces: list[tuple[fx.Node, int, int]] = []
    for user in linear.users:
        if user.target is aten.slice.Tensor and _is_last(user, 1, rank) and argument(user, 4, "step", 1) == 1:
            bounds = argument(user, 2, "start"), argument(user, 3, "end")
            if any(isinstance(bound, fx.Node) for bound in bounds):
                return []
            pieces.append((user, *slice(*bounds).indices(width)[:2]))
        elif user.target in _SPLITS and _is_last(user, 2, rank):
            ends = _bounds([int(part.shape[-1]) for part in user.meta["val"]])
            pieces += [(one, *ends[int(args_of(one)[1])]) for one in user.users if one.target is operator.getitem]
        else:
            return []
    return pieces


def _is_last(node: fx.Node, place: int, rank: int) -> bool:
    return int(argument(node, place, "dim", 0)) % rank == rank - 1
