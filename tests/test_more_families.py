"""More families of transformers, in one process.

Standard is exact at two degrees, kraken changes the function, and the KV cache changes nothing about that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kraken_compiler.capture import Capture, capture
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from tests.lane_decoder import LaneDecoder
from tests.table_notes import note
from tests.test_cache_families import CAPACITY, PROMPTS, TOKENS, checked, full_logits, ragged
from tests.test_families import CHANGED, relative_error
from tests.zoo import FAMILIES, MORE_FAMILIES, logits_of, random_tokens, token_batch

pytestmark = pytest.mark.slow

DEGREES = (2, 3)


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_forms(name: str) -> None:
    build = MORE_FAMILIES[name]
    model = build()
    source = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    ids = token_batch(model, 3, 13)
    wanted = logits_of(model, ids)

    def error(degree: int, form: str) -> float:
        program, _ = lower(source.program, degree, form)
        if build.no_cache:
            assert build.no_cache in program.no_cache
        assert (program.cached is None) == bool(build.no_cache), program.no_cache
        have: Tensor = logits_of(LaneModule.from_program(program, source.store.read), ids)
        return relative_error(have, wanted)

    exact = [error(degree, "standard") for degree in DEGREES]
    assert max(exact) < 1e-4
    with torch.no_grad():
        assert error(2, "kraken") > CHANGED
    note("more", name, error=max(exact), cache=error_of_cache(lower(source.program, 2, "kraken")[0], source))


def error_of_cache(program: Program, source: Capture) -> float | None:
    """How far a ragged prompt and single tokens are from recomputation; None without a cache."""
    if program.cached is None:
        return None
    ids = random_tokens(97, len(PROMPTS), TOKENS)
    have = ragged(LaneDecoder(program, source.store.read, len(PROMPTS), CAPACITY), ids)
    rows, at = torch.arange(len(PROMPTS))[:, None], torch.tensor(PROMPTS)[:, None] - 1
    want = full_logits(program, source.store.read, ids)[rows, at + torch.arange(have.shape[1])]
    return checked(have, want, "kraken, ragged")


def test_no_family_is_there_twice() -> None:
    assert not FAMILIES.keys() & MORE_FAMILIES.keys()
