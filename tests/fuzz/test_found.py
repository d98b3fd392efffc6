"""What random decoders have shown, each as the smallest recipe that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.compare import compare
from tests.fuzz.recipe import Recipe

pytestmark = pytest.mark.slow

FOUND = {
    "a mask for every head beside capped scores of grouped heads": Recipe(
        heads=6, kv_heads=3, layers=1, positions="alibi", attention="softcap"
    ),
    "single precision inside a model of double precision": Recipe(
        layers=1, dtype="float64", positions="rotary_complex"
    ),
    "a lane's own position that equals a constant of the graph, for ONNX Runtime": Recipe(
        degree=5,
        heads=5,
        kv_heads=5,
        head_size=12,
        columns=5,
        layers=1,
        positions="rotary_partial",
        projections="fused",
        qk_norm="per_head",
        weights="masked",
        weight_place="all",
        size_rule="divided_by_length",
        size_place="attention",
    ),
    "a query head a lane for the one KV head, without a KV cache": Recipe(
        degree=4, heads=4, kv_heads=1, layers=1, size_rule="from_the_end"
    ),
    "a norm over heads in double precision, of which two lanes hold some": Recipe(
        degree=5, heads=6, kv_heads=3, head_size=4, columns=6, layers=1, dtype="float64", qk_norm="wide"
    ),
    "a model whose rounding alone makes more than the usual tolerance": Recipe(
        degree=2,
        heads=4,
        kv_heads=2,
        head_size=12,
        columns=27,
        layers=2,
        positions="rotary_complex",
        attention="sdpa_masked",
        qk_norm="wide",
        weights="stacked",
        weight_place="down",
        norm="none",
        ffn="gated_interleaved",
        activation="relu_squared",
        branch_scale=0.5,
        head="capped",
    ),
    "a weight times truth values, without a KV cache": Recipe(layers=1, weights="masked", size_rule="even"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_right(what: str, tmp_path: Path) -> None:
    recipe = FOUND[what]
    found = compare(recipe, tmp_path)
    assert not found.refused
    assert bool(found.decoded.numel()) == recipe.has_cache
