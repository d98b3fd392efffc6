"""Where the rows of a batch lie in what a program takes and gives, and how they are cut in two. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kraken_compiler.ir.calls import CallSpec, InputSpec
from kraken_compiler.ir.size_checks import suits

_SECOND = "_second"
"""Behind the name of an input: the same of the second half."""


@dataclass(frozen=True)
class RowDims:
    """The dims of the rows.

    Attributes:
        inputs: Of each of a program's inputs; None if it has none and serves both halves.
        outputs: Of each of its outputs; None if it has none and is the same for both halves.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]

    def count(self, inputs: Sequence[Any]) -> int:
        """How many rows the inputs have, tensors or arrays."""
        return next(int(value.shape[dim]) for value, dim in zip(inputs, self.inputs) if dim is not None)

    def halves(self, inputs: Sequence[Any], cut: int) -> tuple[list[Any], list[Any]]:
        """The inputs of each half.

        Args:
            inputs: The program's, tensors or arrays.
            cut: How many rows the first half has.
        """
        first, second = (
            [value if dim is None else value[_along(dim, part)] for value, dim in zip(inputs, self.inputs)]
            for part in (slice(cut), slice(cut, None))
        )
        return first, second

    def suits(self, call: CallSpec, specs: Sequence[InputSpec], inputs: Sequence[Any], cut: int) -> bool:
        """True if both halves keep to a program's rules for sizes.

        Args:
            call, specs: How the program is called.
            inputs, cut: See `halves`.
        """
        return all(suits(call, specs, [one.shape for one in half]) for half in self.halves(inputs, cut))

    def flat(self, halves: tuple[Sequence[Any], Sequence[Any]]) -> list[Any]:
        """What belongs to both halves' inputs, in the order of the graph that runs both: shared ones are there once."""
        first, second = halves
        return [*first, *(one for one, dim in zip(second, self.inputs) if dim is not None)]

    def specs(self, inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
        """The inputs of the graph that runs both halves."""
        second = [replace(spec, name=spec.name + _SECOND) for spec in inputs]
        return tuple(self.flat((inputs, second)))

    def joined(
        self, first: Sequence[Any], second: Sequence[Any], concatenate: Callable[[list[Any], int], Any]
    ) -> tuple[Any, ...]:
        """The outputs of the batch.

        Args:
            first, second: The outputs of each half.
            concatenate: Takes tensors or arrays and a dim.
        """
        return tuple(
            one if dim is None else concatenate([one, other], dim)
            for one, other, dim in zip(first, second, self.outputs, strict=True)
        )


def _along(dim: int, part: slice) -> tuple[slice, ...]:
    return (*(slice(None) for _ in range(dim)), part)
