"""The windows between every reduce's start and its wait in the program that will run."""

from __future__ import annotations

import torch
from torch import fx

from kraken_compiler._torch_compat import functional_collectives
from kraken_compiler.errors import VerificationError
from kraken_compiler.ir.schedule import FormPlan, Window
from kraken_compiler.ir.windows import measure_windows
from kraken_compiler.ranks.communicators import ops
from kraken_compiler.ranks.communicators.communicator import Communicator


def check_schedule(module: fx.GraphModule, plan: FormPlan | None = None) -> tuple[Window, ...]:
    """Measure the window of every reduce of a lane graph or of a rank's graph, in launch order.

    Args:
        module: A lane graph with `kraken::` collectives, or a rank's graph with real ones.
        plan: Where the promised windows come from; None promises nothing.

    Raises:
        VerificationError: A reduce is never awaited, or there are more or fewer reduces than planned.
    """
    assert ops is not None  # importing it defines the ops of compiled graphs
    starts, waits = _communicator_calls(module.graph)
    if torch.distributed.is_available():
        real = functional_collectives()
        starts.append(real.all_reduce.default)
        waits.append(real.wait_tensor.default)
    starts.append(torch.ops.kraken_rank.start.default)
    waits.append(torch.ops.kraken_rank.wait.default)
    try:
        return measure_windows(module.graph, plan, more_starts=starts, more_waits=waits)
    except ValueError as error:
        raise VerificationError(str(error)) from error


def _communicator_calls(graph: fx.Graph) -> tuple[list[object], list[object]]:
    """The methods of communicators that a rank's graph calls to start and to await a reduce."""
    targets = [node.target for node in graph.nodes if isinstance(getattr(node.target, "__self__", None), Communicator)]
    methods = [(target, getattr(target, "__name__", "")) for target in targets]
    return [target for target, name in methods if name == "start"], [
        target for target, name in methods if name == "wait"
    ]
