"""What random decoders have shown, each as the smallest recipe that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.compare import compare
from tests.fuzz.recipe import Recipe

FOUND = {
    "a mask for every head beside capped scores of grouped heads": Recipe(
        heads=6, kv_heads=3, layers=1, positions="alibi", attention="softcap"
    ),
    "single precision inside a model of double precision": Recipe(
        layers=1, dtype="float64", positions="rotary_complex"
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_right(what: str, tmp_path: Path) -> None:
    found = compare(FOUND[what], tmp_path)
    assert not found.refused
    assert not found.no_cache
    assert found.decoded.numel()
