"""Runs a lane program as a differentiable function: all lanes in this process, or this rank's lane alone.

In one process a weight that differs between lanes has them as its first dim, and `torch.vmap` runs what lies between
two collectives on all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.collectives import Collectives, InOneProcess
from kraken_compiler.lanes.segments import Collective, Segment, Step, cut, nodes_of
from kraken_compiler.ops.devices import retarget

_NO_BATCHING = ("Batching rule not implemented", "vmap: ")
"""The beginnings of torch's messages for operators that cannot be batched."""

_LaneDims = tuple[int | None, ...]


class LaneRunner:
    """A lane program as a differentiable function of its weights and inputs.

    Attributes:
        program: The lane program.
    """

    def __init__(
        self,
        program: Program,
        collectives: Collectives | None = None,
        *,
        recompute: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare to run.

        Args:
            program: A lane program, of any degree.
            collectives: This rank's; None means that all lanes run here, and that weights that differ between lanes
                are stacked, [degree, *local shape].
            recompute: Keep only what goes from segment to segment, and compute the rest again in the backward pass.
            device: Where it runs.
        """
        self.program = program
        self._recompute = recompute
        self._steps, self._outputs = cut(program.graph)
        self._stacked = collectives is None and any(spec.shards for spec in program.weights.values())
        self._collectives = collectives or InOneProcess(program.degree)
        self._names = (*program.weights, *(spec.name for spec in program.inputs))
        self._differing_names = _differing_names(program, self._steps) if self._stacked else frozenset()
        self._last_reads = _last_reads(self._steps, self._outputs)
        # What follows the last sum is needed at once by the backward pass, so nothing is won by dropping it.
        self._recompute_end = max(
            (n for n, step in enumerate(self._steps) if isinstance(step, Collective) and step.kind == "wait"),
            default=-1,
        )
        self._lane_dims = [self._dims_of(step) for step in self._steps]
        self._unbatched_steps: set[int] = set()
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        """Run on `device` from now on."""
        for step in self._steps:
            if isinstance(step, Segment):
                retarget(step.module, device)

    def run_flat(
        self, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], *, batched: bool = True
    ) -> tuple[Tensor, ...]:
        """Run on the graph's inputs.

        Args:
            weights: Every weight by name, in the order of the weight table.
            inputs: In the order of `program.inputs`.
            batched: Whether lanes run at once; else one after the other, each operator as the program has it. Autocast
                sees vmap's operators and not the program's.

        Returns:
            The graph's outputs.
        """
        values: dict[str, Any] = dict(zip(self._names, (*weights.values(), *inputs), strict=True))
        for number, step in enumerate(self._steps):
            if isinstance(step, Segment):
                results = self._run_segment(number, step, [values[name] for name in step.inputs], batched)
                values.update(zip(step.outputs, results, strict=True))
            else:
                values[step.name] = self._run_collective(step, values[step.operand])
            for name in self._last_reads[number]:
                del values[name]
        return tuple(values[name] for name in self._outputs)

    def _run_segment(self, number: int, segment: Segment, operands: list[Any], batched: bool) -> tuple[Tensor, ...]:
        run: Any = segment.module.forward
        dims = self._lane_dims[number]
        if dims is not None:
            run = partial(self._on_all_lanes, number, run, dims, batched)
        if self._recompute and number < self._recompute_end and torch.is_grad_enabled():
            # Nothing is drawn at random in a captured model, so there is no generator to wind back.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        results: tuple[Tensor, ...] = run(*operands)
        return results

    def _on_all_lanes(
        self, number: int, run: Any, dims: tuple[_LaneDims, _LaneDims], batched: bool, *operands: Any
    ) -> tuple[Tensor, ...]:
        in_dims, out_dims = dims
        if batched and number not in self._unbatched_steps:
            try:
                outputs: tuple[Tensor, ...] = torch.vmap(run, in_dims, out_dims)(*operands)  # type: ignore[arg-type]
            except RuntimeError as error:
                if not str(error).startswith(_NO_BATCHING):
                    raise
                self._unbatched_steps.add(number)  # It has an operator that vmap will not know next time either.
            else:
                return outputs
        lanes = [
            run(*(value if dim is None else value[lane] for value, dim in zip(operands, in_dims, strict=True)))
            for lane in range(self.program.degree)
        ]
        return tuple(
            values[0] if dim is None else torch.stack(values)
            for values, dim in zip(zip(*lanes, strict=True), out_dims, strict=True)
        )

    def _dims_of(self, step: Step) -> tuple[_LaneDims, _LaneDims] | None:
        """The lane dims of a segment's inputs and outputs; None if it is the same for all lanes."""
        if not isinstance(step, Segment) or self._differing_names.isdisjoint(step.inputs):
            return None
        inputs, outputs = (
            tuple(0 if name in self._differing_names else None for name in names)
            for names in (step.inputs, step.outputs)
        )
        return inputs, outputs

    def _run_collective(self, call: Collective, operand: Any) -> Any:
        if call.kind == "start":
            return self._collectives.start(operand, call.operand in self._differing_names)
        if call.kind == "wait":
            return self._collectives.wait(operand)
        return self._collectives.all_gather(operand, call.dim)


def _differing_names(program: Program, steps: Sequence[Segment | Collective]) -> frozenset[str]:
    """Names of the values that differ between lanes; what a collective gives never does."""
    names = {name for name, spec in program.weights.items() if spec.shards}
    for step in steps:
        if isinstance(step, Segment):
            differing_nodes: set[fx.Node] = set()
            for node in step.module.graph.nodes:
                if node.name in names or any(operand in differing_nodes for operand in node.all_input_nodes):
                    differing_nodes.add(node)
            names |= {node.name for node in nodes_of(step) if node in differing_nodes and node.name in step.outputs}
    return frozenset(names)


def _last_reads(steps: Sequence[Segment | Collective], outputs: Sequence[str]) -> list[list[str]]:
    """The values that nobody reads after a step, by the step's number."""
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        names = (*step.inputs, *step.outputs) if isinstance(step, Segment) else (step.operand, step.name)
        last.update(dict.fromkeys(names, number))
    reads: list[list[str]] = [[] for _ in steps]
    for name, number in last.items():
        if name not in outputs:
            reads[number].append(name)
    return reads
