"""Healing in one process: gradients, loss, LoRA, checkpointing, checkpoints that resume to the last bit."""

from __future__ import annotations

import errno
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.lanes.runner import LaneRunner
from kraken_compiler.lanes.segments import Segment, cut
from kraken_compiler.quality.healing.lora import merge_lora
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.training import loss as loss_module
from kraken_compiler.training.checkpoint import load_checkpoint, save_checkpoint
from kraken_compiler.training.learning_rate import learning_rate, rows_of_step
from kraken_compiler.training.loop import train
from kraken_compiler.training.loss import distillation_loss
from kraken_compiler.training.state import STATE_FILE, Lock, RunState, open_state, read_state
from kraken_compiler.training.trainer import Trainer
from kraken_compiler.training.watch import SilentWatch, StepRecord
from kraken_compiler.weights.io import safetensors_writer
from kraken_compiler.weights.lane_tensors import PREFIX, lane_tensor_reader, with_lane_tensors
from tests.healing_models import captured, lowered, parameters_of, rows, stacked_reader, trainer_for

pytestmark = pytest.mark.slow

SETTINGS = HealSettings(steps=6, batch=2, learning_rate=3e-3, evaluate_every=3, save_every=2, precision="float32")


def run_steps(trainer: Trainer, folder: Path, state: RunState | None = None) -> list[float]:
    """Train to the end on 5 rows; returns the KL on the held-out rows, evaluation by evaluation."""
    state = state or open_state(folder, {}, restart=False)
    outcome = train(trainer, rows(5), rows(3, seed=1), folder, state, SilentWatch())
    return [kl for _, kl in outcome.held_out]


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.trained().items()}


@pytest.mark.parametrize(("family", "form"), [("llama", "kraken"), ("gpt2", "ladder"), ("phi", "standard")])
@pytest.mark.parametrize("recompute", [False, True])
def test_segments_have_the_gradients_of_the_lane_module(family: str, form: str, recompute: bool) -> None:
    program = lowered(family, form)
    module = LaneModule.from_program(program, captured(family).store.read)
    weights = {name: getattr(module.weights, name) for name in program.weights}
    trained = [weight for weight in weights.values() if weight.requires_grad]
    ids = rows(2)
    found, wanted = (
        run([ids])[0]
        for run in (
            lambda inputs: LaneRunner(program, recompute=recompute).run_flat(weights, inputs),
            module.run_flat,
        )
    )
    direction = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((one * direction).sum(), trained, allow_unused=True) for one in (found, wanted)]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_segments_hold_no_collectives() -> None:
    steps, outputs = cut(lowered("llama", "kraken").graph)
    segments = [step for step in steps if isinstance(step, Segment)]
    collectives = [step for step in steps if not isinstance(step, Segment)]
    assert len(collectives) == 2 + 2 * 3 + 1, "of the embedding, of three layers, of the head"
    assert not any("kraken.all" in node.name for step in segments for node in step.module.graph.nodes)
    assert len(outputs) == 1


@pytest.mark.parametrize("at_once", [1, 64, 1 << 20])
def test_the_loss_is_kl_divergence(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(loss_module, "_ELEMENTS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn((7, 31), generator=generator) for _ in range(2))
    wanted_of = student.clone().requires_grad_()
    logs = [F.log_softmax(logits, -1) for logits in (wanted_of, teacher)]
    wanted = F.kl_div(*logs, reduction="sum", log_target=True)
    wanted.backward()
    student.requires_grad_()
    found = distillation_loss(student, teacher.clone()) * 3
    found.backward()
    torch.testing.assert_close(found.detach() / 3, wanted.detach())
    torch.testing.assert_close(student.grad, 3 * wanted_of.grad)


def test_rows_and_rates_follow_from_the_step() -> None:
    data = torch.arange(5)[:, None].expand(5, 2)
    drawn = [rows_of_step(data, replace(SETTINGS, seed=3), step)[:, 0].tolist() for step in range(5)]
    numbers = list(itertools.chain(*drawn))
    passes = numbers[:5], numbers[5:]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(5))
    assert passes[0] != passes[1]
    assert rows_of_step(data, replace(SETTINGS, seed=3), 2)[:, 0].tolist() == drawn[2]
    rates = [learning_rate(replace(SETTINGS, steps=100, warmup=10, learning_rate=1.0), step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11


def test_training_lowers_the_loss_and_the_held_out_kl(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=20, batch=8, evaluate_every=20, save_every=20)
    trainer = trainer_for("llama", "kraken", settings)
    kls: list[float] = []

    class Collecting(SilentWatch):
        def stepped(self, record: StepRecord) -> None:
            kls.append(record.loss)

    state = open_state(tmp_path / "heal", {}, restart=False)
    outcome = train(trainer, rows(256), rows(16, seed=99), tmp_path / "heal", state, Collecting())
    assert outcome.after["kl"] < 0.85 * outcome.before["kl"]
    assert sum(kls[-5:]) < 0.85 * sum(kls[:5])
    assert outcome.held_out == ((0, outcome.before["kl"]), (20, outcome.after["kl"]))


def test_checkpointing_and_bfloat16_train_alike() -> None:
    plain, recomputed, rounded = (
        trainer_for("llama", "kraken", settings)
        for settings in (
            SETTINGS,
            replace(SETTINGS, gradient_checkpointing=True),
            replace(SETTINGS, precision="bfloat16"),
        )
    )
    for trainer in (plain, recomputed, rounded):
        for step in range(2):
            trainer.step(rows(2, seed=step), 1e-3)
    torch.testing.assert_close(weights_of(recomputed), weights_of(plain), rtol=0, atol=0)
    torch.testing.assert_close(weights_of(rounded), weights_of(plain), rtol=0, atol=5e-3)
    assert all(weight.dtype == torch.float32 for weight in weights_of(rounded).values())


def test_lora_trains_updates_that_merge_into_the_weights() -> None:
    trainer = trainer_for("llama", "kraken", replace(SETTINGS, lora=2))
    assert trainer.parameters.trained()
    assert all("lora_" in name for name in trainer.parameters.trained())
    whole = parameters_of("llama", "kraken")
    torch.testing.assert_close(trainer.parameters.operands(), whole.operands(), rtol=0, atol=0)
    kls = [trainer.step(rows(4), 1e-2).loss for _ in range(5)]
    assert kls[-1] < kls[0]
    program = lowered("llama", "kraken")
    runner = LaneRunner(program)
    with torch.no_grad():
        before = runner.run_flat(trainer.parameters.operands(), [rows(2)])[0]
        merge_lora(trainer.parameters)
        results = {spec.name: value for spec, value in trainer.parameters.results()}
        after = runner.run_flat(whole.operands() | results, [rows(2)])[0]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert sum(not torch.equal(results[name], value) for name, value in whole.operands().items() if name in results) > 6


@pytest.mark.parametrize("lora", [None, 2])
def test_a_resumed_run_ends_bit_equal(tmp_path: Path, lora: int | None) -> None:
    settings = replace(SETTINGS, lora=lora)
    straight = trainer_for("llama", "kraken", settings)
    curve = run_steps(straight, tmp_path / "straight")

    class Interrupted(Exception):
        pass

    class Interrupting(SilentWatch):
        def stepped(self, record: StepRecord) -> None:
            if record.step == 5:
                raise Interrupted

    folder = tmp_path / "cut"
    state = open_state(folder, {}, restart=False)
    with pytest.raises(Interrupted):
        train(trainer_for("llama", "kraken", settings), rows(5), rows(3, seed=1), folder, state, Interrupting())
    state = open_state(folder, {}, restart=False)
    assert state.step == 4
    resumed = trainer_for("llama", "kraken", settings)
    assert run_steps(resumed, folder, state) == curve
    torch.testing.assert_close(weights_of(resumed), weights_of(straight), rtol=0, atol=0)
    assert [path.name for path in folder.glob("step-*")] == ["step-6.rank-0.safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for("llama", "kraken", SETTINGS)
    folder = tmp_path / "heal"
    state = save_checkpoint(trainer, folder, open_state(folder, {}, restart=False), 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_writer.SafetensorsWriter, "_write", full)
        with pytest.raises(InputFileError, match=r"step-2\.rank-0\.safetensors.*No space left on device"):
            save_checkpoint(trainer, folder, state, 2)
    assert read_state(folder) == state
    load_checkpoint(trainer, folder, state)
    assert not list(folder.glob("*.partial"))


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    trainer = trainer_for("llama", "kraken", SETTINGS)
    folder = tmp_path / "heal"
    state = save_checkpoint(trainer, folder, open_state(folder, {}, restart=False), 1)
    (path,) = folder.glob("step-1.*")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"its hash differs.*--restart"):
        load_checkpoint(trainer, folder, state)
    (folder / STATE_FILE).write_text('{"format_version": 1')
    with pytest.raises(InputFileError, match=r"state\.json: damaged"):
        open_state(folder, {}, restart=False)
    (folder / STATE_FILE).write_text(json.dumps({"format_version": 9, "held_out": []}))
    with pytest.raises(InputFileError, match=r"format version 9"):
        open_state(folder, {}, restart=False)
    assert open_state(folder, {}, restart=True).step == 0


def test_a_folder_is_one_run_s(tmp_path: Path) -> None:
    folder = tmp_path / "heal"
    wanted = {"artifact": "a", "batch": 2, "lora": None, "learning_rate": 3e-4}
    open_state(folder, wanted, restart=False)
    assert open_state(folder, wanted, restart=False).step == 0
    with pytest.raises(
        UsageError, match=r"another artifact, --batch was 2 and is 4, --lora was not given and is 8; .* --restart"
    ):
        open_state(folder, {**wanted, "artifact": "b", "batch": 4, "lora": 8}, restart=False)
    with Lock(folder):
        with pytest.raises(UsageError, match="another run works on it"), Lock(folder):
            pass
        with pytest.raises(UsageError, match="another run works on it"):
            open_state(folder, wanted, restart=True)
    assert read_state(folder).identity == wanted
    foreign = tmp_path / "foreign.heal"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(UsageError, match="holds something else"):
            open_state(foreign, wanted, restart)
    assert (foreign / "thesis.txt").exists()


def test_a_diverged_training_ends_before_it_spoils_the_weights(tmp_path: Path) -> None:
    trainer = trainer_for("llama", "kraken", replace(SETTINGS, evaluate_every=6))
    folder = tmp_path / "heal"
    name, parameter = next(iter(trainer.parameters.trained().items()))

    class Spoiling(SilentWatch):
        def stepped(self, record: StepRecord) -> None:
            if record.step == 3:
                with torch.no_grad():
                    parameter.fill_(math.nan)

    state = open_state(folder, {}, restart=False)
    with pytest.raises(UsageError, match=r"step 4: the loss is not finite.*after step 2 is kept"):
        train(trainer, rows(5), rows(3, seed=1), folder, state, Spoiling())
    fresh = trainer_for("llama", "kraken", SETTINGS)
    load_checkpoint(fresh, folder, read_state(folder))
    assert weights_of(fresh)[name].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lane_tensors_are_rows_of_the_weight_table(family: str) -> None:
    program = lowered(family, "kraken")
    read = captured(family).store.read
    names = [name for name, spec in program.weights.items() if spec.kind == "parameter"]
    own = with_lane_tensors(program, names)
    assert all(spec.source.startswith(PREFIX) == (name in names) for name, spec in own.weights.items())
    assert own.cached is not None
    for program_of_cache in (own.cached.step, own.cached.tables):
        sources = {spec.source for spec in program_of_cache.weights.values() if spec.kind == "parameter"}
        assert sources <= {PREFIX + name for name in names}
    stacked = stacked_reader(program, read)
    source = lane_tensor_reader(
        own.weights,
        own.degree,
        lambda spec, lane: (
            stacked(program.weights[spec.name])[lane] if spec.shards else stacked(program.weights[spec.name])
        ),
        read,
    )
    modules = [LaneModule.from_program(one, reader) for one, reader in ((program, read), (own, source))]
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=0, atol=0)
