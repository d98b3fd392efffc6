"""Inline `with torch.no_grad()` and `with autocast(enabled=False)` regions, which export as calls of a sub-graph.

%r = wrap_with_set_grad_enabled(False, %submod, %x)     ->     %cos = cos(%x)
%cos = getitem(%r, 0)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kraken_compiler._torch_compat import HigherOrderOperator
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import args_of, module_path

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_BRANCHING = {"cond", "switch", "while_loop", "scan", "associative_scan", "map", "map_impl"}
"""Names of the operators of higher order that branch or loop; the others call a function once."""


@dataclass(frozen=True)
class InlineRegions(Pass[Program]):
    name: ClassVar[str] = "inline-regions"

    def run(self, program: Program) -> PassResult:
        matches = 0
        while regions := [node for node in program.graph.nodes if node.target in (_SET_GRAD, _AUTOCAST)]:
            for region in regions:
                if region.target is _AUTOCAST and args_of(region)[2]:
                    reason = "it computes under torch.autocast, whose casts are not in the graph"
                    hint = "Cast the model to the dtype it should run in and capture it without autocast."
                    return PassResult(matches, (Rejection(reason, (region.name,), module_path(region), hint),))
                _inline(program.module, region)
                matches += 1
        other_nodes = [node for node in program.graph.nodes if isinstance(node.target, HigherOrderOperator)]
        return PassResult(matches, tuple(map(_reject, other_nodes[:1])))


def _reject(node: fx.Node) -> Rejection:
    if str(node.target) in _BRANCHING:
        reason = f"its forward branches or loops inside the graph ('{node.target}'), and lanes run one straight graph"
        hint = "Choose values with torch.where, or ask for sizes with a plain `if`, whose branch is kept and held to."
    else:
        reason = (
            f"its graph calls a function through an operator of higher order ('{node.target}'), which lanes cannot run"
        )
        hint = "Compute the same with plain tensor operators, in the module's own code."
    return Rejection(reason, (node.name,), module_path(node), hint)


def _inline(module: fx.GraphModule, region: fx.Node) -> None:
    first_operand = 2 if region.target is _SET_GRAD else 5
    reference = args_of(region)[first_operand - 1]
    assert isinstance(reference, fx.Node)
    assert isinstance(reference.target, str)
    body = module.get_submodule(reference.target)
    assert isinstance(body, fx.GraphModule)
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, args_of(region)[first_operand:], strict=True))
    with module.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                # Every region numbers its own sub-graphs from 1, so their names need the region's in front.
                name = f"{reference.target}_{node.target}"
                setattr(module, name, getattr(body, str(node.target)))
                values[node] = module.graph.get_attr(name)
            elif node.op == "call_function":
                values[node] = module.graph.node_copy(node, values.__getitem__)
    outputs: Any = fx.node.map_arg(body.graph.output_node().args[0], values.__getitem__)
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[args_of(user)[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not reference.users:
        module.graph.erase_node(reference)
