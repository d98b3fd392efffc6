"""A program as a language model: from token ids to logits, whatever other inputs it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.runtime.derived_inputs import Derived, derived_input, no_language_model
from kraken_compiler.size_checks import require_sizes


def logits_function(
    inputs: Sequence[InputSpec], call: CallSpec, run_flat: Callable[[list[Tensor]], Sequence[Tensor]]
) -> Callable[..., Tensor]:
    """Turn a program into a function from token ids to logits.

    Args:
        inputs: The program's inputs.
        call: Says what its outputs are.
        run_flat: Runs the program on its flat inputs.

    Returns:
        Token ids [batch, sequence] -> logits [batch, sequence or 1, vocabulary]. That of an encoder-decoder takes the
        ids [batch, length] of the text that the encoder reads as well; without, the encoder reads the same text.

    Raises:
        UsageError: The program needs an input that does not follow from the ids, has no logits, or was not compiled
            for sizes that it is called with.
    """
    inputs_of = inputs_function(inputs)

    def logits_of(ids: Tensor, source: Tensor | None = None) -> Tensor:
        tensors = inputs_of(ids, source)
        require_sizes(call, inputs, [tensor.shape for tensor in tensors])
        logits = run_flat(tensors)[call.logits]
        if logits.dim() != 3:
            raise no_language_model(call.output_names[call.logits], logits.dim())
        return logits

    return logits_of


def inputs_function(inputs: Sequence[InputSpec]) -> Callable[..., list[Tensor]]:
    """Turn token ids [batch, sequence], and those of an encoder's text, into the flat inputs of a program.

    Args:
        inputs: The program's inputs.

    Raises:
        UsageError: The program needs an input that does not follow from the ids.
    """
    kinds = [(spec, derived_input(spec, inputs)) for spec in inputs]
    return lambda ids, source=None: [
        _derive(spec, kind, ids, ids if source is None else source) for spec, kind in kinds
    ]


def _derive(spec: InputSpec, kind: Derived, ids: Tensor, source: Tensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if kind in (Derived.IDS, Derived.SOURCE):
        return (ids if kind is Derived.IDS else source).to(dtype)
    if kind is Derived.ONES:
        return torch.ones_like(ids, dtype=dtype)
    positions = torch.arange(ids.shape[1], dtype=dtype, device=ids.device)
    return positions if len(spec.shape) == 1 else positions.expand_as(ids)
