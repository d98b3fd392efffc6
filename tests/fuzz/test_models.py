"""Random small decoders: what is emitted computes what the model computes, or the model is refused.

Each is rewritten in standard form and compared with the module at several sizes, decoded with a KV cache and run on
ONNX devices; those of a group are then decoded on real ranks in one launch. `KRAKEN_FUZZ_MODELS` says how many models,
`KRAKEN_FUZZ_SEED` which.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from safetensors.torch import load_file

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.ranks.run_ranks import run_ranks
from tests.fuzz.compare import Comparison, compare, recomputed, require_close
from tests.fuzz.recipe import Recipe, recipes

pytestmark = pytest.mark.slow

DEGREES = range(1, 7)
MODELS = int(os.environ.get("KRAKEN_FUZZ_MODELS", "300"))
SEED = int(os.environ.get("KRAKEN_FUZZ_SEED", "0"))
GROUP = 50
"""Models to a test: enough for one launch of ranks to be cheap, few enough for workers to share the tests."""

GROUPS = [(DEGREES[number % len(DEGREES)], SEED + number) for number in range(max(1, MODELS // GROUP))]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("degree", "number"), GROUPS)
def test_a_random_decoder_is_computed_exactly_or_refused(degree: int, number: int, tmp_path: Path) -> None:
    compared: dict[Recipe, Comparison] = {}

    @seed(number)
    @settings(max_examples=GROUP, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipes(degree))
    def check(recipe: Recipe) -> None:
        with tempfile.TemporaryDirectory() as directory:
            found = compare(recipe, Path(directory))
        assert bool(found.refused) == bool(recipe.refusal), f"{recipe}: {found.refused or 'not refused'}"
        assert recipe.refusal in found.refused, f"{recipe}: {found.refused}"
        assert not (recipe.has_cache and found.no_cache), f"{recipe}: {found.no_cache}"
        compared[recipe] = found

    check()
    cached = {f"{index}": recipe for index, (recipe, found) in enumerate(compared.items()) if found.decoded.numel()}
    assert cached, "none of these models has a KV cache"
    for name, recipe in cached.items():
        program, read = compared[recipe].program, compared[recipe].read
        assert program is not None
        assert read is not None
        source = Source(kind="module", name=repr(recipe))
        write_artifact(program, program.reader(read), tmp_path / name, source=source, backends=[TorchBackend()])
    payload = {"directory": str(tmp_path), "programs": list(cached)}
    run_ranks("tests.fuzz.rank_functions:decode_all", degree, payload, timeout=120)
    for rank in range(degree):
        results = load_file(tmp_path / f"out-{rank}.safetensors")
        for name, recipe in cached.items():
            require_close(recipe, f"decoding on rank {rank}", results[name], compared[recipe].decoded, recomputed)
