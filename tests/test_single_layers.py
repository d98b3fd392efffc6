"""Single layers calibrated in groups: each as if it were alone, and what it costs then."""

from __future__ import annotations

import pytest
import torch

from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.lower import lower, lower_split, split_source
from kraken_compiler.quality.calibration.single_layers import APART, SingleLayers
from kraken_compiler.quality.sensitivity import measure_sensitivity, single_layers
from tests.test_calibration import batches, captured

pytestmark = pytest.mark.slow

FORM = "kraken"


@pytest.fixture(scope="module")
def single() -> SingleLayers:
    source = captured("llama")
    split = split_source(source.program, 2)
    standard = lower_split(split, "standard", cached=False)
    read_lane = read_from_source(standard, source.store.read)
    given = [[ids] for ids in batches(0, 8)]
    return SingleLayers(split, standard, read_lane, given, [at % 4 == 3 for at in range(8)])


def test_a_layers_weights_are_its_own_and_those_between_it_and_the_next(single: SingleLayers) -> None:
    source = captured("llama")
    assert single.in_order() == [0, 1, 2]
    for layer in single.in_order():
        program, _ = lower(source.program, 2, FORM, [layer], cached=False)
        old, new = read_from_source(program, source.store.read), single.reader(FORM, layer)
        changed = {
            spec.source
            for spec in program.weights.values()
            if any(not torch.equal(old(spec, lane), new(spec, lane)) for lane in range(2))
        }
        assert changed
        numbers = {int(name.split("layers.")[1].split(".")[0]) for name in changed}
        assert min(numbers) == layer
        assert max(numbers) < layer + APART


def test_calibrated_layers_cost_less(single: SingleLayers) -> None:
    source = captured("llama")
    wanted = [(FORM, run) for run in single_layers(3)]
    unseen = batches(1, 2)
    split = split_source(source.program, 2)
    before = measure_sensitivity(source, split, wanted, unseen, "numbers")
    after = measure_sensitivity(source, split, wanted, unseen, "numbers", calibrated=single.ids, reader=single.reader)
    assert "not calibrated" in before.lines()[0]
    tokens = sum(ids.numel() for ids in single.ids)
    assert f"each calibrated on {tokens:,} tokens" in after.lines()[0]
    assert sum(after.cost(FORM, layer) for layer in range(3)) < sum(before.cost(FORM, layer) for layer in range(3))
