"""A program as a language model: from token ids to logits, whatever other inputs it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import CallSpec, InputSpec


def logits_function(
    inputs: Sequence[InputSpec], call: CallSpec, run_flat: Callable[[list[Tensor]], Sequence[Tensor]]
) -> Callable[[Tensor], Tensor]:
    """Turn a program into a function from token ids to logits.

    Args:
        inputs: The program's inputs.
        call: Says what its outputs are.
        run_flat: Runs the program on its flat inputs.

    Returns:
        Token ids [batch, sequence] -> logits [batch, sequence or 1, vocabulary].

    Raises:
        UsageError: The program needs an input that does not follow from the ids, or has no logits.
    """
    sources = [_input_source(spec, len(inputs)) for spec in inputs]

    def logits_of(ids: Tensor) -> Tensor:
        logits = run_flat([source(ids) for source in sources])[call.logits]
        if logits.dim() != 3:
            raise UsageError(
                f"the program is no language model: its output '{call.output_names[call.logits]}' is {logits.dim()}-d"
            )
        return logits

    return logits_of


def _input_source(spec: InputSpec, inputs: int) -> Callable[[Tensor], Tensor]:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.parameter == "input_ids" or (inputs == 1 and not dtype.is_floating_point):
        return lambda ids: ids.to(dtype)
    if spec.parameter == "attention_mask":
        return lambda ids: torch.ones_like(ids, dtype=dtype)
    if spec.parameter in ("position_ids", "cache_position"):
        return lambda ids: _positions(ids, dtype, flat=len(spec.shape) == 1)
    raise UsageError(f"cannot generate: the program also needs the input '{spec.parameter}'")


def _positions(ids: Tensor, dtype: torch.dtype, flat: bool) -> Tensor:
    positions = torch.arange(ids.shape[1], dtype=dtype, device=ids.device)
    return positions if flat else positions.expand_as(ids)
