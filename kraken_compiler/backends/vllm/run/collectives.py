"""The collectives of a lane graph inside vLLM.

On CUDA a sum that something hides runs on a stream of its own, by vLLM's own communicator:

    out = kraken_engine::start(part)                the side stream waits for what has been computed, then reduces
    kraken_engine::wait(out, part, after)           the stream that computes waits for the side stream

`out` and `part` lie in memory of the stream that computes and live until the wait, so no allocator hands either out
while the other stream uses it. `after` is the last matrix product of the window: it keeps compilers from moving a wait
up. On CPUs sums are our own messages (`ranks/communicators/ops.py`). A sum that nothing hides is vLLM's all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from kraken_compiler.backends.torch_dist.run.insert_collectives import replace_collectives
from kraken_compiler.backends.vllm.run.options import ENGINE, NONE
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.ops.op_sets import PROJECTIONS
from kraken_compiler.ranks.communicators import ops
from kraken_compiler.ranks.communicators.message import MessageCommunicator

_NAME = "kraken-engine"

_library: Any = torch.library.Library("kraken_engine", "DEF")  # type: ignore[no-untyped-call]
_library.define("start(Tensor part) -> Tensor")
_library.define("wait(Tensor(a!) out, Tensor part, Tensor? after=None) -> ()")


class _SideStream:
    """The stream on which sums run."""

    def __init__(self) -> None:
        self.stream: Any = None

    def get(self) -> Any:
        if self.stream is None:
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self.stream


_SIDE = _SideStream()
"""One for a process, for compiled code can hold no objects."""


def _start(part: Tensor) -> Tensor:
    out, side = torch.empty_like(part), _SIDE.get()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out.copy_(get_tp_group()._all_reduce_out_place(part))
    return out


def _wait(out: Tensor, part: Tensor, after: Tensor | None = None) -> None:
    torch.cuda.current_stream().wait_stream(_SIDE.get())


_library.impl("start", _start, "CUDA")
_library.impl("wait", _wait, "CUDA")
torch.library.register_fake("kraken_engine::start", torch.empty_like, lib=_library)
torch.library.register_fake("kraken_engine::wait", lambda out, part, after=None: None, lib=_library)


def bind_engine_collectives(module: fx.GraphModule, device: torch.device, kind: str) -> None:
    """Replace every `kraken::` collective of a lane graph, in place.

    Args:
        module: A lane graph.
        device: Where it computes.
        kind: See `EngineOptions.collectives`.
    """
    assert ops is not None  # importing it defines the ops
    windows = {window.start: window for window in measure_windows(module.graph)}
    nodes = {node.name: node for node in module.graph.nodes}
    is_cpu = device.type == "cpu"
    if is_cpu and kind != NONE and any(window.gemms for window in windows.values()):
        _message_communicator()
    hidden: dict[fx.Node, fx.Node] = {}  # what was started -> the last product of its window

    def start(graph: fx.Graph, node: fx.Node) -> fx.Node:
        part, gemms = node.args[0], windows[node.name].gemms
        assert isinstance(part, fx.Node)
        if kind == NONE:
            return graph.call_function(torch.ops.aten.clone.default, (part,))
        if kind == ENGINE or not gemms:
            # vLLM adds up in place, so nothing else may read the part, or what it is a view of.
            is_alone = part.target in PROJECTIONS and len(part.users) == 1
            return part if is_alone else graph.call_function(torch.ops.aten.clone.default, (part,))
        target = torch.ops.kraken_rank.start.default if is_cpu else torch.ops.kraken_engine.start.default
        handle = graph.call_function(target, (part, _NAME) if is_cpu else (part,))
        hidden[handle] = nodes[gemms[-1]]
        return handle

    def wait(graph: fx.Graph, node: fx.Node) -> fx.Node:
        handle = node.args[0]
        assert isinstance(handle, fx.Node)
        if kind == NONE:
            return handle
        if handle not in hidden:
            return graph.call_function(tensor_model_parallel_all_reduce, (handle,))
        if is_cpu:
            return graph.call_function(torch.ops.kraken_rank.wait.default, (handle, _NAME, hidden[handle]))
        graph.call_function(torch.ops.kraken_engine.wait.default, (handle, handle.args[0], hidden[handle]))
        return handle

    def gather(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(tensor_model_parallel_all_gather, node.args[:2])

    replace_collectives(module, start, wait, gather)


def _message_communicator() -> None:
    """Open the communicator of this process's tensor-parallel group, under the name that compiled code asks for."""
    from kraken_compiler.ranks.communicators.communicator import find

    if find(_NAME) is None:
        # Who is opened stays open under its name; its peers are connected at the first sum.
        MessageCommunicator.of_group(get_tp_group().cpu_group, name=_NAME)
