"""A program as a language model: the inputs that follow from token ids, and the logits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.calls import DECODER_IDS, INPUT_IDS, CallSpec, InputSpec
from kraken_compiler.ir.size_checks import require_sizes

Array = npt.NDArray[Any]


class Derived(Enum):
    """The contents of an input that follows from token ids."""

    IDS = "the token ids"
    SOURCE = "the token ids of the text that an encoder reads"
    ONES = "a one for every token"
    POSITIONS = "every token's position"


def derived_input(spec: InputSpec, inputs: Sequence[InputSpec]) -> Derived:
    """The contents of an input when nothing but token ids is known.

    Args:
        spec: The input.
        inputs: All that the program has.

    Raises:
        UsageError: It does not follow from the ids.
    """
    derived = find_derived(spec, inputs)
    if derived is None:
        raise UsageError(f"cannot generate: the program also needs the input '{spec.parameter}'")
    return derived


def find_derived(spec: InputSpec, inputs: Sequence[InputSpec]) -> Derived | None:
    """The contents of an input as in `derived_input`; None if they do not follow from the ids."""
    if spec.parameter == DECODER_IDS or (len(inputs) == 1 and "float" not in spec.dtype):
        return Derived.IDS
    if spec.parameter == INPUT_IDS:
        return Derived.SOURCE if reads_source(inputs) else Derived.IDS
    if spec.parameter == "attention_mask" and not reads_source(inputs):
        return Derived.ONES
    if spec.parameter in ("position_ids", "cache_position"):
        return Derived.POSITIONS
    return None


def reads_source(inputs: Sequence[InputSpec]) -> bool:
    """True for an encoder-decoder of texts: its encoder reads one, and its decoder writes another."""
    return {INPUT_IDS, DECODER_IDS} <= {spec.parameter for spec in inputs}


def inputs_function(inputs: Sequence[InputSpec]) -> Callable[..., dict[str, Array]]:
    """Turn token ids [batch, sequence], and those of an encoder's text, into a program's inputs by name.

    Args:
        inputs: The program's inputs.

    Raises:
        UsageError: The program needs an input that does not follow from the ids.
    """
    kinds = [(spec, derived_input(spec, inputs)) for spec in inputs]

    def inputs_of(ids: Array, source: Array | None = None) -> dict[str, Array]:
        texts = {Derived.SOURCE: ids if source is None else source}
        return {spec.name: _derive(spec, kind, texts.get(kind, ids)) for spec, kind in kinds}

    return inputs_of


def logits_function(
    inputs: Sequence[InputSpec],
    call: CallSpec,
    run: Callable[[Mapping[str, Any]], Sequence[Any]],
    inputs_of: Callable[..., Mapping[str, Any]] | None = None,
) -> Callable[..., Any]:
    """Turn a program into a function from token ids to logits.

    Args:
        inputs: The program's inputs.
        call: Names its outputs.
        run: Runs the program on inputs by name; gives its outputs, or the logits alone.
        inputs_of: Makes the inputs out of ids in another way than `inputs_function` does.

    Returns:
        Token ids [batch, sequence] -> logits [batch, sequence or 1, vocabulary], as `run` gives them. That of an
        encoder-decoder takes the ids [batch, length] of the text that the encoder reads as well; without, the encoder
        reads the same text.

    Raises:
        UsageError: The program needs an input that does not follow from the ids, has no logits, or was not compiled
            for sizes that it is called with.
    """
    make_inputs = inputs_of or inputs_function(inputs)

    def logits_of(ids: Any, source: Any = None) -> Any:
        arrays = make_inputs(ids, source)
        require_sizes(call, inputs, [array.shape for array in arrays.values()])
        outputs = run(arrays)
        logits = outputs[call.logits] if len(outputs) > 1 else outputs[0]
        if logits.ndim != 3:
            raise UsageError(
                f"the program is no language model: its output '{call.output_names[call.logits]}' is {logits.ndim}-d"
            )
        return logits

    return logits_of


def _derive(spec: InputSpec, kind: Derived, ids: Array) -> Array:
    # numpy has no bfloat16, and all of these are whole numbers that it holds.
    dtype = np.dtype(np.float32 if spec.dtype == "bfloat16" else spec.dtype)
    if kind in (Derived.IDS, Derived.SOURCE):
        return np.ascontiguousarray(ids, dtype)
    if kind is Derived.ONES:
        return np.ones(ids.shape, dtype)
    positions = np.arange(ids.shape[1], dtype=dtype)
    return positions if len(spec.shape) == 1 else np.ascontiguousarray(np.broadcast_to(positions, ids.shape))
