"""More families of transformers, in one process: standard is exact at two degrees, and kraken changes the function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kraken_compiler.backends.single.lane_module import LaneModule
from kraken_compiler.capture import capture
from kraken_compiler.lowering import lower
from tests.table_notes import note
from tests.test_families import CHANGED, relative_error
from tests.zoo import FAMILIES, MORE_FAMILIES, logits_of, token_batch

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
    note("more", name, error=max(exact), no_cache=build.no_cache)


def test_no_family_is_there_twice() -> None:
    assert not FAMILIES.keys() & MORE_FAMILIES.keys()
