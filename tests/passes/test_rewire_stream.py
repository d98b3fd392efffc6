"""What the new stream computes is tested in tests/test_forms.py; here, how the graph looks."""

from __future__ import annotations

import pytest

from kraken_compiler.ir.forms import FORMS, KRAKEN, LADDER, STANDARD, Form
from kraken_compiler.passes.form.assign_forms import AssignForms
from kraken_compiler.passes.form.rewire_stream import RewireStream
from kraken_compiler.passes.pipelines import RECOGNIZE
from tests.passes.helpers import Golden, assert_close, captured, check_idempotent, check_pass, gpt, targets
from tests.passes.models import AlibiAttention, Gpt


@pytest.mark.parametrize("parallel", [False, True])
def test_standard_form_keeps_the_numbers(parallel: bool) -> None:
    """On one lane; two reduces a layer, or one where the branches are parallel in the source."""
    sample = gpt(2, parallel)
    reduces = 2 if parallel else 4
    program = check_pass(RewireStream(), sample, matches=reduces, before=(*RECOGNIZE, AssignForms(STANDARD)))
    calls = targets(program)
    assert calls.count("kraken.all_reduce_start") == calls.count("kraken.wait") == reduces


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_layer_table_follows(form: Form) -> None:
    """Names in the table are names of the new graph, and every branch's nodes are all there."""
    program = gpt(2).after(*RECOGNIZE, AssignForms(form), RewireStream())
    nodes = {node.name: node for node in program.graph.nodes}
    table = program.layers
    assert {table.embedding, table.final, table.head} <= set(nodes)
    for branch in table.branches:
        assert {branch.stream, branch.output, *branch.nodes} <= set(nodes)
        assert branch.output in branch.nodes
        assert any(nodes[branch.stream] in nodes[name].all_input_nodes for name in branch.nodes)


def test_masks_are_kept_once() -> None:
    """What a branch does not share with the stream, here its ALiBi bias, is not built again for every read."""
    sample = captured(Gpt(layers=2, attention=AlibiAttention))
    before = sample.recognized
    program = sample.lanes(2, KRAKEN)
    assert targets(program).count("aten.arange") == targets(before).count("aten.arange")
    check_idempotent(RewireStream(), program)


def test_parallel_branches_with_one_norm_get_one_each_where_their_reads_differ() -> None:
    model = Gpt(layers=2, parallel=True)
    for block in model.blocks:
        block.norm2 = block.norm1
    sample = captured(model)

    def norms(form: Form) -> int:
        return targets(sample.after(*RECOGNIZE, AssignForms(form), RewireStream())).count("aten.layer_norm")

    standard, kraken = norms(STANDARD), norms(KRAKEN)
    assert kraken >= standard
    program = sample.lanes(2, STANDARD)
    assert_close(sample.run(program), sample.expected())


def test_golden(golden: Golden) -> None:
    golden("rewire_stream", gpt(2).after(*RECOGNIZE, AssignForms(LADDER), RewireStream()))
