"""What forms cost in runs of layers: against measuring each by itself, and what the cache remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kraken_compiler.capture import Capture, capture
from kraken_compiler.commands.transform import transform
from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.program import Split
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.passes.lower import split_source
from kraken_compiler.quality import sensitivity as module
from kraken_compiler.quality.sensitivity import ends, measure_sensitivity, single_layers
from tests.zoo import SUPPORTED, token_batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def captured() -> Capture:
    model = SUPPORTED["plain_gpt"]()
    return capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})


BATCHES = [torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def split(captured: Capture) -> Split:
    return split_source(captured.program, 2)


def test_every_run_is_measured_alone(captured: Capture, split: Split) -> None:
    count = 2
    wanted = [(form, run) for form in ("kraken", "sync-drop") for run in (*single_layers(count), *ends(count))]
    done: list[tuple[int, int]] = []
    found = measure_sensitivity(
        captured, split, wanted, BATCHES, "numbers", advance=lambda now, total, unit: done.append((now, total))
    )
    assert len(found.costs) == len(set(wanted)) == 6
    assert done[-1] == (6, 6)
    model = SUPPORTED["plain_gpt"]()
    source = transform(model, 2, "standard", example_inputs={"input_ids": BATCHES[0]})
    for cost in found.costs:
        layers = list(range(cost.first, cost.last + 1))
        lanes = transform(model, 2, cost.form, layers, example_inputs={"input_ids": BATCHES[0]})
        with torch.inference_mode():
            direct = evaluate(source, lanes, BATCHES, "numbers")
        assert cost.kl == pytest.approx(direct.kl, rel=1e-3, abs=1e-7)
    lines = found.lines()
    assert "kraken there alone" in lines[1]
    assert len(lines) == 2 + count


def test_what_was_measured_is_remembered(
    captured: Capture, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "model.kraken.sensitivity.json"
    lowered: list[object] = []
    lower = module.lower_split

    def counting(*arguments: object, **options: object) -> object:
        lowered.append(arguments)
        return lower(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "lower_split", counting)
    first = measure_sensitivity(captured, split, [("kraken", (0, 0))], BATCHES, "numbers", cache=cache)
    assert len(lowered) == 1
    both = measure_sensitivity(
        captured, split, [("kraken", (0, 0)), ("kraken", (1, 1))], BATCHES, "numbers", cache=cache
    )
    assert len(lowered) == 2
    assert both.costs[0] == first.costs[0]
    measure_sensitivity(captured, split, [("kraken", (1, 1))], BATCHES, "numbers", cache=cache)
    assert len(lowered) == 2
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]
    measure_sensitivity(captured, split, [("kraken", (1, 1))], BATCHES[:1], "numbers", cache=cache)
    assert len(lowered) == 3, "another text"
    assert len(json.loads(cache.read_text())["costs"]) == 1
    columns = split.layers.branches[1].columns
    units = {2: tuple(tuple(range(lane, columns, 2)) for lane in range(2))}
    other = split_source(captured.program, 2, assign=lambda planned: units)
    measure_sensitivity(captured, other, [("kraken", (1, 1))], BATCHES[:1], "numbers", cache=cache)
    assert len(lowered) == 4, "other columns on the lanes"

    measure_sensitivity(
        captured, other, [("kraken", (1, 1))], BATCHES[:1], "numbers", calibrated=BATCHES[1:], cache=cache
    )
    assert len(lowered) == 5, "calibrated on something"

    cache.write_text("nonsense")
    with pytest.raises(InputFileError, match="is no record of sensitivities"):
        measure_sensitivity(captured, split, [("kraken", (1, 1))], BATCHES, "numbers", cache=cache)
