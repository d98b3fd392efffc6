"""Refuse a model that draws random numbers in evaluation mode.

%y = dropout(%x, 0.5, True)                      ->     unsupported: ... draws random numbers ...

No two runs of such a model agree, so no program can be compared with it. A draw that reaches no output is removed, and
a leaky ReLU of random slope has the mean one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler._torch_compat import arguments_by_name
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.graph_tools import ancestors, aten, module_path


@dataclass(frozen=True)
class RefuseRandomDraws(Pass[Program]):
    name: ClassVar[str] = "refuse-random-draws"

    def run(self, program: Program) -> PassResult:
        needed_nodes = ancestors(program.graph.output_node())
        matches = 0
        for node in reversed(list(program.graph.nodes)):
            # The runner keeps it: torch takes a draw for an effect, as it moves the generator on.
            if node not in needed_nodes and _is_tagged(node):
                program.graph.erase_node(node)
                matches += 1
        for node in [node for node in program.graph.nodes if node.target is aten.rrelu.default and _is_off(node)]:
            arguments = arguments_by_name(node)
            node.target = aten.leaky_relu.default
            node.args, node.kwargs = (arguments["self"], (arguments["lower"] + arguments["upper"]) / 2), {}
            matches += 1
        draws = [node for node in program.graph.nodes if _is_tagged(node) and not _is_off(node)]
        return PassResult(matches, tuple(map(_reject, draws[:1])))


_SWITCHES = ("train", "training")
_RATES = ("p", "dropout", "dropout_p")


def _is_tagged(node: fx.Node) -> bool:
    # torch forgot one.
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.target is aten.feature_alpha_dropout.default


def _is_off(node: fx.Node) -> bool:
    """True if an argument keeps the operator from drawing."""
    arguments = arguments_by_name(node)
    is_off = any(arguments.get(name, True) is False for name in _SWITCHES)
    return is_off or any(arguments.get(name, 1.0) == 0.0 for name in _RATES)


def _reject(node: fx.Node) -> Rejection:
    name = str(node.target).removeprefix("aten.").removesuffix(".default")
    reason = f"it draws random numbers ('{name}') in evaluation mode, so no program can compute what it computes"
    hint = "Let it draw while it trains only"
    if "dropout_p" in arguments_by_name(node):
        hint += ", e.g. `dropout_p=self.dropout if self.training else 0.0`"
    elif "dropout" in name:
        hint += ", e.g. `F.dropout(x, p, self.training)`, with all of its modules in evaluation mode"
    return Rejection(reason, (node.name,), module_path(node), hint + ".")
