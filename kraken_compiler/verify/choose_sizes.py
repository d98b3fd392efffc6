"""The sizes that programs are compared at: inside their rules, and other ones than the example's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from kraken_compiler._torch_compat import size_hint
from kraken_compiler.ir.program import Program
from kraken_compiler.passes.sample_inputs import all_sizes, position_limit

_EXAMPLE = (2, 16)
"""Sizes of an example that nobody remembers."""


def check_sizes(program: Program, *, growing: bool = False) -> tuple[tuple[int, int], ...]:
    """Batch and sequence sizes to compare programs at: one below and one above the example's, if the rules allow.

    Args:
        program: The program, before or after lowering.
        growing: Every row of a batch must also be allowed at the lengths from which a cache is filled token by token.
    """
    own_batch, own = _example_sizes(program)
    limit = position_limit(program)

    def is_allowed(batch: int, sequence: int) -> bool:
        lengths = range(max(1, sequence - 2 * batch - 1), sequence) if growing else ()
        return sequence <= limit and all(all_sizes(program, batch, size) is not None for size in (*lengths, sequence))

    below = [*range(min(own - 1, 7), 1, -1), *range(8, own)]
    above = [own + 3, own + 1, own + 2, *range(own + 4, own + 80), *(factor * own for factor in (3, 4, 6, 8))]
    varying = {size for spec in program.inputs for size in spec.shape}
    if "sequence" not in varying:
        below, above = [own], [own]
    small = _first((1, 3, 2, 4, 5, 6, 8, own_batch), below or above, is_allowed)
    large = _first(
        (3, 4, 2, 5, 6, 8, 1, own_batch), [*above, *reversed(below)], lambda *size: size != small and is_allowed(*size)
    )
    sizes = [size for size in (small, large) if size is not None]
    return tuple(sizes) or ((own_batch, own),)


def _first(
    batches: Iterable[int], sequences: Iterable[int], is_allowed: Callable[[int, int], bool]
) -> tuple[int, int] | None:
    return next(((batch, one) for one in sequences for batch in batches if is_allowed(batch, one)), None)


def _example_sizes(program: Program) -> tuple[int, int]:
    """Batch and sequence size of the example that was captured, as far as the graph has them."""
    sizes: dict[str, int] = {}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.inputs:
        value = placeholders[spec.name].meta.get("val")
        for name, size in zip(spec.shape, value.shape if isinstance(value, Tensor) else ()):
            hint = size_hint(size)
            if isinstance(name, str) and hint is not None:
                sizes.setdefault(name, hint)
    return sizes.get("batch", _EXAMPLE[0]), sizes.get("sequence", _EXAMPLE[1])
