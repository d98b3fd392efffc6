"""Give every layer a form, and derive from the forms table what that means for the whole model. An analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kraken_compiler.ir.forms import STANDARD, Form
from kraken_compiler.ir.program import Planned, Program, Recognized
from kraken_compiler.passes.compiler_pass import Pass, PassResult
from kraken_compiler.passes.form.derive_schedule import derive_plan
from kraken_compiler.passes.shapes import value_of


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
        return PassResult(count, program=program.at(Planned, plan=plan))
