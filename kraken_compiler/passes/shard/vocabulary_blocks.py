"""The blocks of a vocabulary's rows that lanes hold, of the head and of the embedding alike: they may be one tensor."""

from __future__ import annotations

from kraken_compiler.ir.index_set import IndexSet

SMALLEST_BLOCK = 16
"""Rows per lane below which a vocabulary stays whole: sending parts of it would cost more than holding all."""


def vocabulary_blocks(rows: int, degree: int, smallest: int = SMALLEST_BLOCK) -> tuple[IndexSet, ...] | None:
    """Blocks of equal length, the last one perhaps shorter: 67 rows in 4 are 0-17, 17-34, 34-51 and 51-67.

    Args:
        rows: Of the whole vocabulary.
        degree: Number of lanes.
        smallest: The fewest rows that are worth a block.

    Returns:
        None if blocks would be too small, or the last one empty.
    """
    size = -(-rows // degree)
    if size < smallest or (degree - 1) * size >= rows:
        return None
    return tuple(((lane * size, min((lane + 1) * size, rows)),) for lane in range(degree))
