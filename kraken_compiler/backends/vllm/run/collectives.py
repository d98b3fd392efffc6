"""The collectives of a lane graph inside vLLM.

On CUDA a sum that something hides runs on a stream of its own (`side_stream.py`), and one that nothing hides is vLLM's
all-reduce. Between CPUs all are our own messages (`ranks/communicators/ops.py`), which take half the time of gloo's; of
CPUs that share memory all are vLLM's.
"""

from __future__ import annotations

import torch
from torch import fx
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from kraken_compiler.backends.lane_graph.insert_collectives import replace_collectives
from kraken_compiler.backends.vllm.run.options import AUTO, ENGINE, NONE
from kraken_compiler.backends.vllm.run.side_stream import START, WAIT
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.ops.op_sets import PROJECTIONS
from kraken_compiler.ranks.communicators import ops
from kraken_compiler.ranks.communicators.message import MessageCommunicator

_NAME = "kraken-engine"


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
    if kind == AUTO and is_cpu and _share_memory():
        kind = ENGINE
    if is_cpu and kind not in (ENGINE, NONE) and windows:
        _message_communicator()
    hidden: dict[fx.Node, fx.Node | None] = {}  # what was started -> the last product of its window

    def start(graph: fx.Graph, node: fx.Node) -> fx.Node:
        part, gemms = node.args[0], windows[node.name].gemms
        assert isinstance(part, fx.Node)
        if kind == NONE:
            return graph.call_function(torch.ops.aten.clone.default, (part,))
        if kind == ENGINE or not (gemms or is_cpu):
            # vLLM adds up in place, so nothing else may read the part, or what it is a view of.
            is_alone = part.target in PROJECTIONS and len(part.users) == 1
            return part if is_alone else graph.call_function(torch.ops.aten.clone.default, (part,))
        target = torch.ops.kraken_rank.start.default if is_cpu else START
        handle = graph.call_function(target, (part, _NAME) if is_cpu else (part,))
        hidden[handle] = nodes[gemms[-1]] if gemms else None
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
        graph.call_function(WAIT, (handle, handle.args[0], hidden[handle]))
        return handle

    def gather(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(tensor_model_parallel_all_gather, node.args[:2])

    replace_collectives(module, start, wait, gather)


def _share_memory() -> bool:
    """True if vLLM adds up in memory that the ranks share, and not by torch's process group."""
    communicator = get_tp_group().device_communicator
    return communicator is not None and communicator.dist_module is not torch.distributed


def _message_communicator() -> None:
    """Open the communicator of this process's tensor-parallel group, under the name that compiled code asks for."""
    from kraken_compiler.ranks.communicators.communicator import find

    if find(_NAME) is None:
        # Who is opened stays open under its name; its peers are connected at the first sum.
        MessageCommunicator.of_group(get_tp_group().cpu_group, name=_NAME)
