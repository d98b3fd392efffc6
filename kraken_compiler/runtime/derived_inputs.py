"""Which inputs of a language model follow from its token ids, and how. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.calls import DECODER_IDS, INPUT_IDS, InputSpec


class Derived(Enum):
    """What an input holds."""

    IDS = "the token ids"
    SOURCE = "the token ids of the text that an encoder reads"
    ONES = "a one for every token"
    POSITIONS = "every token's position"


def derived_input(spec: InputSpec, inputs: Sequence[InputSpec]) -> Derived:
    """What an input holds when nothing but token ids is known.

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
    """The same; None if it does not follow from the ids."""
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


def no_language_model(output: str, dims: int) -> UsageError:
    """The error for a program whose output is no logits."""
    return UsageError(f"the program is no language model: its output '{output}' is {dims}-d")
