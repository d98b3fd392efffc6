from __future__ import annotations

from kraken_compiler.ir.forms import KRAKEN, STANDARD
from kraken_compiler.passes.form.assign_forms import AssignForms
from kraken_compiler.passes.form.derive_schedule import derive_plan
from tests.passes.helpers import check_analysis, recognized
from tests.passes.models import D, Gpt


def test_gives_every_layer_its_form() -> None:
    """What follows from the forms is tested in tests/test_forms.py."""
    _, program = recognized(Gpt(layers=2))
    planned = check_analysis(AssignForms((STANDARD, KRAKEN)), program, "plan")
    assert planned.plan == derive_plan(program.layers.branches, [STANDARD, KRAKEN], bytes_per_token=D * 8)
    planned = check_analysis(AssignForms(KRAKEN), program, "plan")
    assert planned.plan.forms == ("kraken", "kraken")
    planned = check_analysis(AssignForms(), program, "plan")
    assert planned.plan.forms == ("standard", "standard")
