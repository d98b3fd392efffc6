"""Training calibrated lanes end to end: what it changes, when its result is kept, and why there may be none."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from kraken_compiler.capture import Capture, capture
from kraken_compiler.ir.program import LaneProgram
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.lanes.logits import LogitsOf, lane_logits
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.calibration import train_on as module
from kraken_compiler.quality.calibration.lane_weights import LaneWeights
from kraken_compiler.quality.calibration.record import TrainingRecord
from kraken_compiler.quality.calibration.train_on import train_on
from kraken_compiler.text import json_text
from tests.test_quantized_weights import INT8
from tests.test_quantized_weights import captured as quantized
from tests.zoo import SUPPORTED, random_tokens

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "gpt_neox", "bloom")
"""Those that regression refits in full, and those with norms after branches, with experts, with joined branches."""


def rows(seed: int, count: int = 8) -> Tensor:
    """Token ids."""
    return random_tokens(96, count, 24, seed=seed)


def lanes_of(captured: Capture, layers: str | None = None) -> tuple[LaneProgram, LaneWeights]:
    """Its lanes in `kraken` form, not calibrated."""
    program = lower(captured.program, 2, "kraken", layers)[0]
    return program, LaneWeights(read_from_source(program, captured.store.read), 2)


def source_of(captured: Capture) -> LogitsOf:
    """The model itself."""
    return lane_logits(captured.program, read_from_source(captured.program, captured.store.read))


def trained(captured: Capture, program: LaneProgram, weights: LaneWeights, passes: int = 6) -> TrainingRecord:
    """Train on 64 rows."""
    source = source_of(captured)
    return train_on(
        source,
        program,
        weights,
        rows(1, 64),
        rows(2),
        passes,
        free_memory=1 << 40,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_training_brings_lanes_closer_to_the_source(family: str) -> None:
    captured = capture(SUPPORTED[family]())
    program, weights = lanes_of(captured)
    source = source_of(captured)
    before = evaluate(source, lane_logits(program, weights.read_lane), [rows(3)], "")
    record = trained(captured, program, weights)
    after = evaluate(source, lane_logits(program, weights.read_lane), [rows(3)], "")
    assert record.kept
    assert record.after < record.before
    assert record.tokens == 6 * 64 * 24
    assert after.kl < before.kl
    assert "kept" in record.line()


def test_the_users_model_stays_bitwise() -> None:
    """What all lanes hold is the user's own tensor where nothing had to be cut or converted."""
    model = SUPPORTED["gpt2"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model)
    program, weights = lanes_of(captured)
    assert trained(captured, program, weights, passes=1).steps
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_before_the_first_changed_one_stay_bitwise() -> None:
    captured = capture(SUPPORTED["llama"]())
    program, weights = lanes_of(captured, "1")
    assert trained(captured, program, weights).kept
    layers = {int(name.split("layers_")[1].split("_")[0]) for name in weights.names}
    # Layer 2 reads what the lanes of layer 1 made of it.
    assert layers == {1, 2}
    assert not any("embed" in name or "lm_head" in name for name in weights.names)


def test_what_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(SUPPORTED["llama"]())
    program, weights = lanes_of(captured)
    monkeypatch.setattr(module, "_LEARNING_RATE", 10.0)
    record = trained(captured, program, weights, passes=1)
    assert not record.kept
    assert not record.after < record.before
    json.loads(json_text(asdict(record)))
    assert weights.names == ()


def test_with_little_memory_the_inside_of_branches_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(SUPPORTED["llama"]())
    needs: list[int] = []
    measure = module._bytes

    def noting(*arguments: Any, **keywords: Any) -> int:
        needs.append(measure(*arguments, **keywords))
        return needs[-1]

    monkeypatch.setattr(module, "_bytes", noting)
    results = []
    for is_short in (False, True):
        program, weights = lanes_of(captured)
        room = needs[0] - 1 if is_short else 1 << 40
        record = train_on(source_of(captured), program, weights, rows(1, 64), rows(2), 1, free_memory=room)
        assert record.steps == 8
        results.append(record.after)
    assert needs[3] < needs[2] == needs[0]
    # Steps are the same but for how bfloat16 rounds what is computed again.
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_why_there_is_no_training() -> None:
    captured = capture(SUPPORTED["llama"]())
    program, weights = lanes_of(captured)

    def note(aside: Tensor, free: int) -> str:
        source = source_of(captured)
        found = train_on(source, program, weights, rows(1), aside, 1, free_memory=free)
        assert found.steps == 0
        assert math.isnan(found.before)
        assert json.loads(json_text(asdict(found)))["before"] is None
        return found.line()

    assert "the texts are too short" in note(rows(2)[:0], 1 << 40)
    assert "GB of memory, 0.0 GB are free" in note(rows(2), 1000)
    assert weights.names == ()
    program = lower(captured.program, 2, "standard")[0]
    assert "no branch reads something else" in note(rows(2), 1 << 40)
    captured = quantized("llama", INT8)
    program, weights = lanes_of(captured)
    assert "integers cannot be trained" in note(rows(2), 1 << 40)
