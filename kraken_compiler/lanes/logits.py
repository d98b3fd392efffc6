"""A lane program in this process as a language model: token ids in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes import derived_inputs
from kraken_compiler.lanes.reference import ReadLane, StreamingProgram

LogitsOf = Callable[[Tensor], Tensor]
"""Token ids int64 [B, S] -> logits [B, S, V]."""


def logits_function(
    inputs: Sequence[InputSpec], call: CallSpec, run_flat: Callable[[list[Tensor]], Sequence[Tensor]]
) -> Callable[..., Tensor]:
    """Turn a program of tensors into a function from token ids to logits; see `derived_inputs.logits_function`.

    Args:
        inputs: The program's inputs.
        call: Names its outputs.
        run_flat: Runs the program on its flat inputs, on the device of the ids.
    """
    return derived_inputs.logits_function(
        inputs, call, lambda tensors: run_flat(list(tensors.values())), _tensors_function(inputs)
    )


def inputs_function(inputs: Sequence[InputSpec]) -> Callable[[Tensor], list[Tensor]]:
    """Turn token ids [batch, sequence] into the flat inputs of a program; see `derived_inputs.inputs_function`."""
    tensors_of = _tensors_function(inputs)
    return lambda ids: list(tensors_of(ids).values())


def _tensors_function(inputs: Sequence[InputSpec]) -> Callable[..., dict[str, Tensor]]:
    arrays_of = derived_inputs.inputs_function(inputs)

    def tensors_of(ids: Tensor, source: Tensor | None = None) -> dict[str, Tensor]:
        arrays = arrays_of(ids.cpu().numpy(), None if source is None else source.cpu().numpy())
        return {
            spec.name: torch.tensor(arrays[spec.name], dtype=getattr(torch, spec.dtype), device=ids.device)
            for spec in inputs
        }

    return tensors_of


def lane_logits(program: Program, read_lane: ReadLane) -> LogitsOf:
    """Token ids [batch, sequence] -> logits, computed node by node with each weight read when it is needed."""
    return logits_function(program.inputs, program.call, StreamingProgram(program, read_lane).run_flat)


def is_causal(logits_of: LogitsOf, ids: Tensor) -> bool:
    """True if the logits of a row's first token are those of a row of that token alone.

    Args:
        logits_of: The model.
        ids: int64 [B, S], S at least 2.
    """
    return torch.allclose(logits_of(ids[:, :1])[:, 0], logits_of(ids)[:, 0], rtol=1e-3, atol=1e-3)


def recorded(logits: Sequence[Tensor]) -> LogitsOf:
    """A model that repeats its earlier logits of the same batches in the same order."""
    following = iter(logits)
    return lambda ids: next(following)
