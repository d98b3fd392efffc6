"""A product with a weight that every row picks from a stack of them is one `expert_linear`.

%w = index(%weights, [%experts])    [n, 96, 64]      ->     %y = kraken.expert_linear(%x, %weights, %bias, %experts)
%m = bmm(%w, unsqueeze(%x, -1))     [n, 96, 1]
%y = squeeze(%m, -1) + index(%bias, [%experts])

Written out, every row would get its own copy of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import EXPERT_LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, near_miss, replace
from kraken_compiler.passes.normalize.canonicalize_linear import weight_derived
from kraken_compiler.passes.shapes import is_tensor, shape_of


@dataclass(frozen=True)
class FuseExperts(Pass[Program]):
    name: ClassVar[str] = "fuse-experts"

    def run(self, program: Program) -> PassResult:
        weights = weight_derived(program)
        outcomes = [_fuse(node, weights) for node in calls(program.graph, aten.squeeze.dim)]
        return PassResult.of(
            [*outcomes, *(_absorb_bias(node, weights) for node in calls(program.graph, EXPERT_LINEAR))]
        )


def _fuse(node: fx.Node, weights: set[fx.Node]) -> bool | Rejection:
    product = args_of(node)[0]
    if product.target not in (aten.bmm.default, aten.matmul.default) or len(shape_of(product)) != 3:
        return False
    left, right = args_of(product)[:2]
    squeeze_dim = int(args_of(node)[1]) % 3
    # W x with a column x, or x W with a row x.
    weight, column, transposed = (left, right, False) if squeeze_dim == 2 else (right, left, True)
    lookup = _stack_lookup(weight, weights, rank=3)
    if squeeze_dim == 0 or lookup is None:
        return False
    if column.target is not aten.unsqueeze.default:
        return near_miss("what is multiplied with the weights of experts is no row made a column", product)
    x = args_of(column)[0]
    if len(shape_of(x)) != 2 or int(args_of(column)[1]) % 3 != squeeze_dim:
        return near_miss("what is multiplied with the weights of experts is not one row for each", product)
    stack, experts = lookup
    with node.graph.inserting_before(node):
        if transposed:
            stack = node.graph.call_function(aten.permute.default, (stack, [0, 2, 1]))
        replace(node, node.graph.call_function(EXPERT_LINEAR, (x, stack, None, experts)))
    return True


def _absorb_bias(node: fx.Node, weights: set[fx.Node]) -> bool:
    if args_of(node)[2] is not None or len(node.users) != 1:
        return False
    (user,) = node.users
    if user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return False
    lookup = _stack_lookup(args_of(user)[1] if args_of(user)[0] is node else args_of(user)[0], weights, rank=2)
    x, stack, _, experts = args_of(node)
    if lookup is None or lookup[1] is not experts:
        return False
    with node.graph.inserting_before(user):
        replace(user, node.graph.call_function(EXPERT_LINEAR, (x, stack, lookup[0], experts)))
    node.graph.erase_node(node)
    return True


def _stack_lookup(node: object, weights: set[fx.Node], rank: int) -> tuple[fx.Node, fx.Node] | None:
    """The stack and the row numbers that `node` picks of it by its first dim."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or len(shape_of(node)) != rank:
        return None
    if node.target is aten.index_select.default and argument(node, 1, "dim") == 0:
        stack, rows = args_of(node)[0], args_of(node)[2]
    elif node.target is aten.index.Tensor and len(args_of(node)[1]) == 1:
        stack, (rows,) = args_of(node)[:2]
    else:
        return None
    fits = stack in weights and rows not in weights and len(shape_of(stack)) == rank and len(shape_of(rows)) == 1
    return (stack, rows) if fits else None
