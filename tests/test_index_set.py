from __future__ import annotations

import pytest

from kraken_compiler.ir.index_set import IndexSet, from_indices, size, to_indices


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [
        ([], ()),
        ([4], ((4, 5),)),
        ([0, 1, 2, 7], ((0, 3), (7, 8))),
        ([1, 3, 5], ((1, 2), (3, 4), (5, 6))),
        (range(1000), ((0, 1000),)),
    ],
)
def test_ranges_and_positions_are_two_spellings(indices: list[int], ranges: IndexSet) -> None:
    assert from_indices(indices) == ranges
    assert to_indices(ranges) == list(indices)
    assert size(ranges) == len(indices)
