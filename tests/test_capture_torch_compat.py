"""The private torch APIs that capture relies on behave as it expects."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from kraken_compiler import _torch_compat as compat


def test_trees() -> None:
    leaves, spec = compat.tree_flatten({"a": (1, None), "b": [2]})
    assert leaves == [1, None, 2]
    assert compat.tree_loads(compat.tree_dumps(spec)) == spec
    assert compat.tree_unflatten(leaves, spec) == {"a": (1, None), "b": [2]}
    assert compat.tree_leaf_names(spec) == ["a.0", "a.1", "b.0"]
    assert [child.num_leaves for child in compat.tree_children(spec)] == [2, 1]
    assert compat.tree_leaf_names(compat.tree_flatten(3)[1]) == ["output"]
    assert compat.tree_map(lambda leaf: leaf, OrderedDict(x=1)) == OrderedDict(x=1)
    assert compat.tree_leaves([1, (2,)]) == [1, 2]


def test_exported_programs() -> None:
    dims = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(nn.Linear(3, 3), (), {"input": torch.ones(2, 3)}, dynamic_shapes={"input": dims})
    assert compat.forward_arg_names(exported) == ("input",)
    assert compat.in_spec(exported).num_leaves == 1
    assert compat.out_spec(exported).is_leaf()
    batch, width = next(node for node in exported.graph.nodes if node.name == "input").meta["val"].shape
    assert compat.shape_symbol(batch) == str(batch)
    assert compat.shape_symbol(width) is None
    assert not any(compat.is_mutating(node) for node in exported.graph.nodes)


def test_operators_and_their_arguments() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.sum.dim_IntList, (x, [1]), {"dtype": torch.float64})
    assert isinstance(node.target, compat.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, compat.HigherOrderOperator)
    assert compat.op_name(node.target) == "aten::sum"
    given = {"self": x, "dim": [1], "keepdim": False, "dtype": torch.float64}
    assert list(compat.arguments_by_name(node).items()) == list(given.items())


def test_fakes() -> None:
    with compat.new_fake_mode():
        assert compat.is_fake(torch.empty(3))
    assert compat.is_fake(torch.empty(3, device="meta"))
    assert not compat.is_packed(torch.empty(3))
    assert not compat.is_packed(nn.Parameter(torch.empty(3, device="meta")))
    assert not compat.is_fake(torch.empty(3))


def test_guards_and_hints() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x if x.shape[0] > 40 else x

    exported = torch.export.export(Asks(), (torch.ones(5, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert compat.traced_guards(exported) == ["L['x'].size()[0] <= 40"]
    size = next(node for node in exported.graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    assert compat.size_hint(size) == 5
    assert compat.guards_of(exported) == {"L['x'].size()[0] <= 40"}
    compat.note_guards(exported, ["a", "a", "b"])
    assert compat.noted_guards(exported) == ("a", "b")
    assert compat.tree_leaf_paths(compat.tree_flatten({"k": [1, 2]})[1]) == ["['k'][0]", "['k'][1]"]


def test_what_a_trace_makes() -> None:
    with compat.new_fake_mode():
        assert compat.is_traced(torch.empty(3))
    assert not compat.is_traced(torch.empty(3, device="meta"))
