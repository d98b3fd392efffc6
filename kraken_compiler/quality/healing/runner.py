"""Run a lane program so that it can be trained: all lanes in this process, or this rank's lane alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from kraken_compiler.ir.devices import retarget
from kraken_compiler.ir.program import Program
from kraken_compiler.quality.healing.collectives import Collectives, InOneProcess
from kraken_compiler.quality.healing.segments import START, WAIT, Collective, Segment, cut, nodes_of


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
        self._differing = _differing(program, self._steps) if self._stacked else frozenset()
        self._last_reads = _last_reads(self._steps, self._outputs)
        # What follows the last sum is needed at once by the backward pass, so nothing is won by dropping it.
        self._recomputed = max((n for n, step in enumerate(self._steps) if _is(step, WAIT)), default=-1)
        for step in self._steps:
            if isinstance(step, Segment):
                retarget(step.module, device)

    def run_flat(self, weights: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on the graph's inputs.

        Args:
            weights: Every weight by name.
            inputs: In the order of `program.inputs`.

        Returns:
            The graph's outputs.
        """
        values: dict[str, Any] = dict(zip(self._names, (*weights.values(), *inputs), strict=True))
        for number, step in enumerate(self._steps):
            if isinstance(step, Segment):
                made = self._run_segment(number, step, [values[name] for name in step.inputs])
                values.update(zip(step.outputs, made, strict=True))
            else:
                values[step.name] = self._run_collective(step, values[step.operand])
            for name in self._last_reads[number]:
                del values[name]
        return tuple(values[name] for name in self._outputs)

    def _run_segment(self, number: int, segment: Segment, operands: list[Any]) -> tuple[Tensor, ...]:
        run: Any = segment.module
        differing = self._differing
        in_dims = tuple(0 if name in differing else None for name in segment.inputs)
        if any(dim is not None for dim in in_dims):
            out_dims: Any = tuple(0 if name in differing else None for name in segment.outputs)
            run = torch.vmap(run, in_dims=in_dims, out_dims=out_dims)
        if self._recompute and number < self._recomputed and torch.is_grad_enabled():
            # Nothing is drawn at random in a captured model, so there is no generator to wind back.
            run_again: tuple[Tensor, ...] = checkpoint(run, *operands, use_reentrant=False, preserve_rng_state=False)
            return run_again
        made: tuple[Tensor, ...] = run(*operands)
        return made

    def _run_collective(self, call: Collective, operand: Any) -> Any:
        if call.target is START:
            return self._collectives.start(operand, call.operand in self._differing)
        if call.target is WAIT:
            return self._collectives.wait(operand)
        return self._collectives.all_gather(operand, call.dim)


def _differing(program: Program, steps: Sequence[Segment | Collective]) -> frozenset[str]:
    """Names of the values that differ between lanes; what a collective gives never does."""
    found = {name for name, spec in program.weights.items() if spec.shards}
    for step in steps:
        if isinstance(step, Segment):
            inside: set[fx.Node] = set()
            for node in step.module.graph.nodes:
                if node.name in found or any(operand in inside for operand in node.all_input_nodes):
                    inside.add(node)
            found |= {node.name for node in nodes_of(step) if node in inside and node.name in step.outputs}
    return frozenset(found)


def _last_reads(steps: Sequence[Segment | Collective], outputs: Sequence[str]) -> list[list[str]]:
    """The values that nobody reads after a step, by the step's number."""
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        names = (*step.inputs, *step.outputs) if isinstance(step, Segment) else (step.operand, step.name)
        last.update(dict.fromkeys(names, number))
    found: list[list[str]] = [[] for _ in steps]
    for name, number in last.items():
        if name not in outputs:
            found[number].append(name)
    return found


def _is(step: Segment | Collective, target: Any) -> bool:
    return isinstance(step, Collective) and step.target is target
