"""Give every layer a form, and derive from the forms table what that means for the whole model. An analysis.

The reduces that the graph has already, of embeddings that lanes hold rows of, are the plan's first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kraken_compiler.ir.forms import STANDARD, Form
from kraken_compiler.ir.program import Planned, Program, Recognized
from kraken_compiler.ir.schedule import Reduce
from kraken_compiler.ops import collectives as ops  # noqa: F401  (registers the collective ops)
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.form.derive_schedule import derive_plan, with_lookups
from kraken_compiler.passes.graph_tools import ancestors, args_of, calls
from kraken_compiler.passes.shapes import shape_of, value_of

_START = torch.ops.kraken.all_reduce_start.default


@dataclass(frozen=True)
class AssignForms(Pass[Recognized]):
    """Every layer takes its form.

    Attributes:
        form: The form of all layers, or one form per layer.
    """

    form: Form | tuple[Form, ...] = STANDARD

    name: ClassVar[str] = "assign-forms"
    requires: ClassVar[type[Program]] = Recognized

    def run(self, program: Recognized) -> PassResult:
        count = len(program.layers.layers)
        forms = [self.form] * count if isinstance(self.form, Form) else list(self.form)
        assert len(forms) == count, f"{len(forms)} forms for {count} layers"
        nodes = {node.name: node for node in program.graph.nodes}
        output = value_of(nodes[program.layers.branches[0].output])
        width = math.prod(int(size) for size in output.shape[2:])
        plan = derive_plan(program.layers.branches, forms, width * output.dtype.itemsize)
        return PassResult(count, program=program.at(Planned, plan=with_lookups(plan, _lookups(program, nodes))))


def _lookups(program: Recognized, nodes: dict[str, fx.Node]) -> list[Reduce]:
    """The reduces of lookups in the graph, each in front of the first branch of the stream that it begins."""
    base = program.layers.branches[-1].base
    begins_last_stream = ancestors(nodes[program.layers.embedding])
    reduces = []
    for start in calls(program.graph, _START):
        point = base if start in begins_last_stream else 0
        part = args_of(start)[0]
        width = int(shape_of(part)[-1]) * value_of(part).dtype.itemsize
        reduces.append(Reduce(0, point + 1, point, point + 1, (), width))
    return reduces
