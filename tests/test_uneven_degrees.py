"""Degrees that do not divide heads or FFN columns: all families in one process, some on ranks and as ONNX devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.ir.index_set import size
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.training.loop import train
from kraken_compiler.training.state import open_state
from kraken_compiler.training.watch import SilentWatch
from kraken_compiler.verify.prefixes import expected
from kraken_compiler.verify.replay import split_lengths
from kraken_compiler.weights.lane_tensors import lane_tensor_reader, with_lane_tensors
from tests.healing_models import lowered, rows, trainer_for
from tests.table_notes import note
from tests.test_families import EVERY_FAMILY, SIZES, lane_program, recognized, relative_error
from tests.test_families_on_ranks import errors_on_ranks, write_programs, wrong
from tests.test_onnx_families import computed_by_devices
from tests.zoo import SUPPORTED, logits_of, random_tokens, token_batch

DEGREES = (3, 5)

ON_RANKS = {3: ("llama", "gpt2", "qwen2_moe", "falcon40"), 5: ("phi3", "bloom")}
"""llama, phi3: a KV head's query heads fall on two lanes. gpt2, bloom: one KV head a query head. falcon40: lanes cut
the groups of its fused projection."""

pytestmark = pytest.mark.slow

AS_DEVICES = (("llama", 3), ("mixtral", 3), ("codegen", 3), ("gpt2", 5))


def padded(program: Program) -> set[str]:
    """The source tensors of which some lanes own less than others."""
    return {
        spec.source
        for spec in program.weights.values()
        for shard in spec.shards
        if len(set(map(size, shard.lanes))) > 1
    }


@EVERY_FAMILY
def test_lanes_compute_what_the_source_computes(name: str) -> None:
    model = recognized(name).model
    batches = [token_batch(model, *size, seed) for seed, size in enumerate(SIZES)]
    wanted = [logits_of(model, ids) for ids in batches]
    reached = {}
    for degree in DEGREES:
        program = lane_program(name, degree, "standard", cache=False)
        lanes = LaneModule.from_program(program, recognized(name).read)
        found = [relative_error(logits_of(lanes, ids), want) for ids, want in zip(batches, wanted)]
        assert max(found) < 1e-4, f"degree {degree}: relative errors {found}"
        assert any("head" not in source for source in padded(program))
        reached[degree] = max(found)
    note("uneven", name, errors=reached)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.timeout(900)
def test_ranks_equal_the_single_process(degree: int, tmp_path: Path) -> None:
    """In every form, in standard and in kraken form with the KV cache, too."""
    vocabulary = min(build.vocab for build in SUPPORTED.values())
    batches = [random_tokens(vocabulary, *size, seed) for seed, size in enumerate(SIZES)]
    wanted: dict[str, Tensor] = {}
    for name in ON_RANKS[degree]:
        wanted.update(write_programs(name, degree, tmp_path, batches))
    save_file({str(number): ids for number, ids in enumerate(batches)}, tmp_path / "batches.safetensors")
    assert not wrong(errors_on_ranks(degree, tmp_path, wanted))


@pytest.mark.parametrize(("name", "degree"), AS_DEVICES)
def test_devices_compute_what_the_lanes_compute(name: str, degree: int, tmp_path: Path) -> None:
    model, read = recognized(name).model, recognized(name).read
    batches = [token_batch(model, *size, seed) for seed, size in enumerate(SIZES)]
    program = lane_program(name, degree, "kraken")
    OnnxBackend().write(program, read, tmp_path)
    lanes = LaneModule.from_program(program, read)
    with torch.no_grad():
        want = [lanes.run_flat([ids])[0] for ids in batches]
    want.append(expected(want[-1], *split_lengths(*SIZES[-1])))
    for device, have in enumerate(computed_by_devices(tmp_path, batches, degree)):
        found = [relative_error(one, other) for one, other in zip(have, want, strict=True)]
        assert max(found) <= 1e-5, f"device {device}: relative errors {found}"


def test_calibration_refits_what_is_padded() -> None:
    """A lane's copies of its neighbour's heads are features like others: the fit may use them."""
    model, read = recognized("llama").model, recognized("llama").read
    standard, program = (lane_program("llama", 3, form) for form in ("standard", "kraken"))
    batches = [[random_tokens(97, 8, 24, seed)] for seed in range(8)]
    held = [number % 4 == 3 for number in range(8)]
    found = calibrate(standard, program, read_from_source(program, read), batches, held)
    assert all(branch.fits for branch in found.branches[1:])
    ids = random_tokens(97, 8, 24, seed=99)
    after, before = (
        divergence(logits_of(LaneModule.from_program(*lanes), ids), logits_of(model, ids))
        for lanes in (found.weights.in_program(program, read), (program, read))
    )
    assert after < before


def divergence(have: Tensor, want: Tensor) -> float:
    """Mean KL(want || have), nats."""
    logs = (torch.log_softmax(logits.flatten(0, -2), dim=-1) for logits in (have, want))
    return F.kl_div(*logs, log_target=True, reduction="batchmean").item()


def test_healing_trains_padding_like_any_weight(tmp_path: Path) -> None:
    """Zeros that pad a lane's columns are its own to change; what is written is what was trained, these included."""
    settings = HealSettings(steps=4, batch=2, learning_rate=3e-3, evaluate_every=4, save_every=4, precision="float32")
    trainer = trainer_for("llama", "kraken", settings, degree=3)
    outcome = train(trainer, rows(5), rows(3, seed=1), tmp_path, open_state(tmp_path, {}, restart=False), SilentWatch())
    losses = [kl for _, kl in outcome.held_out]
    assert losses[-1] < losses[0]
    program = lowered("llama", "kraken", 3)
    trained = {spec.name: value for spec, value in trainer.parameters.results()}
    own = with_lane_tensors(program, trained)
    read = lane_tensor_reader(
        own.weights,
        own.degree,
        lambda spec, lane: trained[spec.name][lane] if spec.shards else trained[spec.name],
        recognized("llama").read,
    )
    written = LaneModule.from_program(own, read).weights
    changed = 0
    for name, spec in program.weights.items():
        if name in trained:
            torch.testing.assert_close(getattr(written, name).detach(), trained[name], rtol=0, atol=0)
        if name in trained and spec.source in padded(program) and spec.source.endswith("o_proj.weight"):
            missing = spec.shape[1] - size(spec.shards[0].lanes[0])
            changed += bool(trained[name][0][:, -missing:].any())
    assert changed == SUPPORTED["llama"].layers
