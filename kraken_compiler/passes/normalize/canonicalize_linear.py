"""Every product with a weight is a `linear`, with its bias inside.

%y = addmm(%b, %x, %w)                           ->     %y = linear(%x, permute(%w, [1, 0]), %b)
%m = matmul(%x, permute(%w))                     ->     %y = linear(%x, %w, %b)
%y = add(%m, %b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from kraken_compiler.ir.program import Program
from kraken_compiler.ops.op_sets import LINEAR
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, argument, aten, calls, descendants, replace
from kraken_compiler.passes.shapes import is_tensor, shape_of


@dataclass(frozen=True)
class CanonicalizeLinear(Pass[Program]):
    name: ClassVar[str] = "canonicalize-linear"

    def run(self, program: Program) -> PassResult:
        weights = weight_derived(program)
        matches = sum(_from_product(node, weights) for node in calls(program.graph, *_PRODUCTS))
        return PassResult(matches + sum(_absorb_bias(node, weights) for node in calls(program.graph, LINEAR)))


_PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)


def weight_derived(program: Program) -> set[fx.Node]:
    """The tensors that are functions of weights alone, the weights included."""
    inputs = {spec.name for spec in program.inputs}
    dynamic = descendants(node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
    return {
        node
        for node in program.graph.nodes
        if node not in dynamic and is_tensor(node) and (node.op == "placeholder" or node.all_input_nodes)
    }


def _from_product(node: fx.Node, weights: set[fx.Node]) -> bool:
    bias, x, weight = args_of(node)[:3] if node.target is aten.addmm.default else (None, *args_of(node)[:2])
    if weight not in weights or x in weights or len(shape_of(weight)) != 2:
        return False
    # A linear's bias has one value per column; addmm also broadcasts others.
    if bias is not None and (bias not in weights or shape_of(bias) != shape_of(weight)[1:]):
        return False
    if node.target is aten.addmm.default and any(argument(node, 9, name, 1) != 1 for name in ("beta", "alpha")):
        return False
    with node.graph.inserting_before(node):
        permuted_weight = node.graph.call_function(aten.permute.default, (weight, [1, 0]))
        operands = (x, permuted_weight) if bias is None else (x, permuted_weight, bias)
        replace(node, node.graph.call_function(LINEAR, operands))
    return True


def _absorb_bias(node: fx.Node, weights: set[fx.Node]) -> bool:
    if argument(node, 2, "bias") is not None or len(node.users) != 1:
        return False
    (user,) = node.users
    if user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return False
    bias = args_of(user)[1] if args_of(user)[0] is node else args_of(user)[0]
    if not isinstance(bias, fx.Node) or bias not in weights or shape_of(bias) != shape_of(node)[-1:]:
        return False
    with node.graph.inserting_before(user):
        replace(user, node.graph.call_function(LINEAR, (*args_of(node)[:2], bias)))
    node.graph.erase_node(node)
    return True
