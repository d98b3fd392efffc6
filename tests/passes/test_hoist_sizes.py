from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from kraken_compiler.ir.program import Program
from kraken_compiler.passes.graph_tools import aten
from kraken_compiler.passes.normalize.hoist_sizes import HoistSizes
from tests.passes.helpers import Golden, captured, check_pass, check_untouched, hidden, targets, tokens


class Sizes(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.arange(mask.shape[0])[:, None] + torch.arange(mask.shape[1]) * torch.where(mask, ids, -ids)


def two_inputs(batch: int, seq: int) -> tuple[Tensor, ...]:
    (ids,) = tokens(batch, seq)
    return ids, ids > 30


def read_sizes_elsewhere(program: Program) -> None:
    """Let the sizes be asked of the mask, as some captures do, where torch.export asks the first input."""
    mask = next(node for node in program.graph.nodes if node.name == "mask")
    for node in [node for node in program.graph.nodes if node.target is aten.sym_size.int]:
        node.args = (mask, node.args[1])


def test_reads_sizes_from_the_first_input(golden: Golden) -> None:
    sample = captured(Sizes(), two_inputs)
    read_sizes_elsewhere(sample.program)
    program = check_pass(HoistSizes(), sample, matches=2)
    sizes = sized(program)
    assert [node.args[0].name for node in sizes] == ["ids", "ids"]
    assert targets(program)[:2] == ["aten.sym_size.int"] * 2
    golden("hoist_sizes", program)


def test_reads_each_size_once() -> None:
    sample = captured(Sizes(), two_inputs)
    for node in sized(sample.program):
        with sample.program.graph.inserting_after(node):
            twin = sample.program.graph.node_copy(node)
        twin.meta = dict(node.meta)
        next(user for user in node.users).replace_input_with(node, twin)
    program = check_pass(HoistSizes(), sample, matches=2)
    assert len(sized(program)) == 2


def test_leaves_sizes_that_no_input_has_alone() -> None:
    class Later(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 1:] * torch.arange(x.shape[1] - 1)[:, None]

    check_untouched(HoistSizes(), captured(Later(), hidden(4)))


def sized(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is aten.sym_size.int]
