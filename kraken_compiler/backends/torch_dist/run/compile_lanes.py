"""Compiles a lane graph with torch.compile, so that it stays overlapped, and checks that it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kraken_compiler._torch_compat import generated_code, mark_sizes
from kraken_compiler.backends.lane_graph.check_schedule import check_schedule
from kraken_compiler.backends.lane_graph.insert_collectives import (
    copy_graph,
    replace_collectives,
    with_real_collectives,
)
from kraken_compiler.backends.lane_graph.run_graph import KEEP_THE_ORDER
from kraken_compiler.backends.torch_dist.check.check_emitted import require_emitted_overlap
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import FormPlan, Window
from kraken_compiler.ops.devices import retarget
from kraken_compiler.ranks.communicators import ops, packed
from kraken_compiler.ranks.communicators.communicator import Communicator
from kraken_compiler.ranks.communicators.group import GroupCommunicator

_OPTIONS: dict[str, Any] = {
    **KEEP_THE_ORDER,
    # These move starts up and waits down, for the collectives of a process group.
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
"""Settings of Inductor."""


class CompiledGraph:
    """A lane graph that runs compiled. Called with the graph's inputs, without the weights; returns its outputs.

    It is compiled when it is first called, once for inputs of any size and once more for every set of sizes that are
    0 or 1 (so that decoding one token gets code of its own), and then its schedule is checked.

    Attributes:
        windows: What lies between start and wait of every reduce in the code that was compiled last.
        compilations: How often it was compiled.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        weights: Mapping[str, Tensor],
        communicator: Communicator,
        plan: FormPlan | None = None,
        *,
        dynamic: Mapping[str, Sequence[int]] | None = None,
        opaque: Mapping[str, Sequence[int]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare; nothing is compiled yet.

        Args:
            module: A lane graph with `kraken::` collectives; it is not changed. Placeholders are the weights, then the
                inputs; ops may write to inputs.
            weights: The weights by placeholder. What is a placeholder and no weight is an input.
            communicator: What adds up the lanes' parts.
            plan: Where the promised windows come from; None promises nothing.
            dynamic: The dims of inputs that change from call to call, by placeholder.
            opaque: Of these also no special code is made for 0 and 1; only ops that torch does not look into may read
                such an input.
            options: Settings of Inductor that go before our own.
        """
        self._graph = module.graph
        self._weights = dict(weights)
        self._communicator = communicator
        self._plan = plan
        self._device = next((weight.device for weight in self._weights.values()), torch.device("cpu"))
        names = [node.name for node in self._graph.nodes if node.op == "placeholder" and node.name not in weights]
        self._dynamic, self._opaque = (
            [(names.index(name), dim) for name, dims in (dims_by_name or {}).items() for dim in dims]
            for dims_by_name in (dynamic, opaque)
        )
        self._options = dict(options or {})
        self._variants: dict[tuple[int, ...], Callable[..., tuple[Tensor, ...]]] = {}
        self.windows: tuple[Window, ...] = ()
        self.compilations = 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run; compile first if inputs of this kind were not seen before.

        Raises:
            VerificationError: Compiling lost an overlap that the form promises.
        """
        kind = tuple([min(inputs[place].shape[dim], 2) for place, dim in self._dynamic])
        run = self._variants.get(kind)
        # Inference mode would be another thing to compile for.
        with torch.inference_mode(False), torch.no_grad():
            return self._compile(kind, inputs) if run is None else run(*inputs)

    def _compile(self, kind: tuple[int, ...], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        module = self._rank_module()
        windows = check_schedule(module, self._plan)
        _wait_for_windows(module, windows)
        settings = {**_OPTIONS, **self._options}
        # Only inputs are looked at before a call; there are hundreds of weights, which do not change.
        settings["guard_filter_fn"] = _input_guards
        run = torch.compile(module.forward, fullgraph=True, options=settings)
        varying = [place for place, size in zip(self._dynamic, kind) if size == 2]
        marked_inputs = [tensor.detach() for tensor in inputs]  # shares memory, but not the marks
        mark_sizes(marked_inputs, varying, self._opaque)
        with generated_code() as codes:
            outputs: tuple[Tensor, ...] = run(*marked_inputs)
        if len(codes) != 1:
            raise VerificationError(f"torch.compile wrote {len(codes)} programs where the schedule of one is checked")
        self.windows = require_emitted_overlap(codes[0], windows)
        self.compilations += 1
        self._variants[kind] = run
        return outputs

    def _rank_module(self) -> fx.GraphModule:
        """The graph with collectives as ops and the weights in it.

        A new one for every compilation, because torch keeps what it compiled with the code that it compiled.
        """
        module = fx.GraphModule({}, copy_graph(self._graph))
        _bind_ops(module, self._communicator)
        holder = nn.Module()
        for node in module.graph.find_nodes(op="placeholder"):
            if node.name in self._weights:
                _bind_weight(module.graph, node, self._weights[node.name], holder)
        bound_module = fx.GraphModule(holder, module.graph)
        retarget(bound_module, self._device)
        return bound_module.eval()


def _wait_for_windows(module: fx.GraphModule, windows: Sequence[Window]) -> None:
    """Let every wait depend on the last matrix product of its window.

    Else the compiler may fuse what reads the sum with what is computed earlier, and await the sum there.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    for window in windows:
        wait = nodes[window.wait]
        if window.gemms and wait.target is torch.ops.kraken_rank.wait.default:
            wait.args = (*wait.args[:2], nodes[window.gemms[-1]])
    module.recompile()


def _bind_weight(graph: fx.Graph, placeholder: fx.Node, weight: Tensor, holder: nn.Module) -> None:
    """Replace a placeholder by the weight, and the linear layers it is the matrix of by ones with a packed weight."""
    if packed.can_pack(weight):
        for user in list(placeholder.users):
            if user.target is torch.ops.aten.linear.default and user.args[1] is placeholder:
                with graph.inserting_before(user):
                    bias = user.args[2] if len(user.args) > 2 else None
                    arguments = (user.args[0], packed.packed_name(weight), weight.shape[0], bias)
                    linear = graph.call_function(torch.ops.kraken_rank.linear.default, arguments)
                user.replace_all_uses_with(linear)
                graph.erase_node(user)
    if placeholder.users:
        if weight.is_floating_point():
            holder.register_parameter(placeholder.name, nn.Parameter(weight, requires_grad=False))
        else:
            holder.register_buffer(placeholder.name, weight)
        with graph.inserting_before(placeholder):
            node = graph.create_node("get_attr", placeholder.name)
        placeholder.replace_all_uses_with(node)
    graph.erase_node(placeholder)


def _bind_ops(module: fx.GraphModule, communicator: Communicator) -> None:
    if isinstance(communicator, GroupCommunicator):
        with_real_collectives(
            module, communicator.group_name, communicator.degree, reduce_dtype=communicator.reduce_dtype
        )
        return
    assert ops is not None  # importing it defines the ops
    calls: Any = torch.ops.kraken_rank
    name = communicator.name

    def start(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(calls.start.default, (node.args[0], name))

    def wait(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(calls.wait.default, (node.args[0], name))

    def gather(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(calls.all_gather.default, (*node.args, name))

    replace_collectives(module, start, wait, gather)


def _input_guards(guards: Sequence[Any]) -> list[bool]:
    return [not guard.name.startswith(("L['self']", "G[")) for guard in guards]
