"""Which inputs of a language model follow from its token ids, and how. Imports no torch."""

from __future__ import annotations

from enum import Enum

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.calls import InputSpec


class Derived(Enum):
    """What an input holds."""

    IDS = "the token ids"
    ONES = "a one for every token"
    POSITIONS = "every token's position"


def derived_input(spec: InputSpec, inputs: int) -> Derived:
    """What an input holds when nothing but token ids is known.

    Args:
        spec: The input.
        inputs: How many the program has.

    Raises:
        UsageError: It does not follow from the ids.
    """
    if spec.parameter == "input_ids" or (inputs == 1 and "float" not in spec.dtype):
        return Derived.IDS
    if spec.parameter == "attention_mask":
        return Derived.ONES
    if spec.parameter in ("position_ids", "cache_position"):
        return Derived.POSITIONS
    raise UsageError(f"cannot generate: the program also needs the input '{spec.parameter}'")


def no_language_model(output: str, dims: int) -> UsageError:
    """The error for a program whose output is no logits."""
    return UsageError(f"the program is no language model: its output '{output}' is {dims}-d")
