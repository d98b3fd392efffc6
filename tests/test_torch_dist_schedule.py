"""The schedule check: it measures windows in the emitted graph, and an empty one that was promised is an error."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import fx

from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
from kraken_compiler.backends.lane_graph.insert_collectives import bind_collectives, with_real_collectives
from kraken_compiler.backends.registry import backend_named
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.errors import UsageError, VerificationError
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.ranks.communicators.none import NoCommunication
from kraken_compiler.verify.overlap import require_overlap
from tests.toy_lane_program import toy_program, toy_sources


def node(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.name == name)


def test_windows_hold_the_gemms_between_start_and_wait() -> None:
    program = toy_program(2)
    windows = check_schedule(program.module, program.plan)
    assert [len(window.gemms) for window in windows] == [2, 0, 2, 0]
    assert [window.promised for window in windows] == [(2,), (), (4,), ()]
    require_overlap(windows)


def test_real_collectives_keep_their_places() -> None:
    program = toy_program(2)
    real = with_real_collectives(program.copy().module, "some group", 2)
    names = [
        str(node.target) for node in real.graph.nodes if "c10d" in str(node.target) or "linear" in str(node.target)
    ]
    linear, start, wait = (
        "aten.linear.default",
        "_c10d_functional.all_reduce.default",
        "_c10d_functional.wait_tensor.default",
    )
    layer = [linear] * 4 + [start] + [linear] * 2 + [start, wait, wait]
    gather = "_c10d_functional.all_gather_into_tensor.default"
    assert names == [*layer, *layer, linear, gather, wait]
    assert [window.gemms for window in check_schedule(real, program.plan)] == [
        window.gemms for window in check_schedule(program.module, program.plan)
    ]
    assert "kraken" not in real.code


def test_a_communicators_methods_keep_their_places() -> None:
    program = toy_program(2)
    communicator = NoCommunication(0, 2)
    bound = bind_collectives(program.copy().module, communicator)
    calls = [node.target for node in bound.graph.nodes if getattr(node.target, "__self__", None) is communicator]
    layer = [communicator.start, communicator.start, communicator.wait, communicator.wait]
    assert calls == [*layer, *layer, communicator.all_gather]
    assert [window.gemms for window in check_schedule(bound, program.plan)] == [
        window.gemms for window in check_schedule(program.module, program.plan)
    ]
    communicator.close()


def test_a_lost_overlap_is_an_error() -> None:
    program = toy_program(2).copy()
    module = program.module
    node(module, "all_reduce_start").append(node(module, "wait"))
    windows = check_schedule(module, program.plan)
    assert windows[0].gemms == ()
    with pytest.raises(
        VerificationError, match=r"1 of 4 reduces lost their overlap.*reduce 0 \(all_reduce_start to wait\)"
    ):
        require_overlap(windows)


def test_a_handle_must_reach_its_wait() -> None:
    module = toy_program(2).copy().module
    wait = node(module, "wait")
    wait.replace_all_uses_with(wait.args[0])  # type: ignore[arg-type]
    module.graph.erase_node(wait)
    with pytest.raises(VerificationError, match="reduce 0"):
        check_schedule(module)


def test_a_missing_reduce_is_an_error() -> None:
    program = toy_program(2).copy()
    for found in [node(program.module, "wait_1"), node(program.module, "all_reduce_start_1")]:
        found.replace_all_uses_with(found.args[0])  # type: ignore[arg-type]
        program.module.graph.erase_node(found)
    with pytest.raises(VerificationError, match="4 reduces, the program 3"):
        check_schedule(program.module, program.plan)


def test_a_wrong_graph_does_not_wait_for_the_weights(tmp_path: Path) -> None:
    program = toy_program(2).copy()
    wait = node(program.module, "wait")
    wait.replace_all_uses_with(wait.args[0])  # type: ignore[arg-type]
    program.module.graph.erase_node(wait)
    sources = toy_sources()

    def read(name: str) -> torch.Tensor:
        time.sleep(0.3)
        return sources[name]

    done = []
    with pytest.raises(VerificationError, match="reduce 0"):
        TorchBackend().write(program, SourceReader(read), tmp_path, lambda *step: done.append(step))
    assert len(done) < len(sources)


def test_attention_and_batched_products_count() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    start = graph.call_function(torch.ops.kraken.all_reduce_start.default, (x,))
    graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (x, x, x))
    graph.call_function(torch.ops.aten.bmm.default, (x, x))
    graph.call_function(torch.ops.aten.add.Tensor, (x, x))
    graph.output((graph.call_function(torch.ops.kraken.wait.default, (start,)),))
    (window,) = check_schedule(fx.GraphModule({}, graph))
    assert window.gemms == ("scaled_dot_product_attention_default", "bmm_default")


def test_backends_are_found_by_name() -> None:
    assert isinstance(backend_named("torch"), TorchBackend)
    with pytest.raises(UsageError, match=r"unknown backend 'torsh'.*did you mean 'torch'"):
        backend_named("torsh")
