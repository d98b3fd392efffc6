"""Closed-form calibration: its arithmetic against direct solutions, and what it does to lane programs of the zoo."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import Rejection
from kraken_compiler.ir.program import Program
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.lanes.logits import LogitsOf, inputs_function, logits_function
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.calibration.attention_received import attention_received
from kraken_compiler.quality.calibration.branch_fit import Streams
from kraken_compiler.quality.calibration.calibrate import calibrate
from kraken_compiler.quality.calibration.lockstep import Lockstep, Values
from kraken_compiler.quality.calibration.moments import Moments
from kraken_compiler.quality.calibration.record import Calibration
from kraken_compiler.quality.calibration.refittable import find_refittable
from kraken_compiler.quality.calibration.ridge import STRENGTHS, fit_ridge, solve_ridge
from kraken_compiler.weights.lane_tensors import has_lane_tensors
from tests.zoo import SUPPORTED, random_tokens

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "gpt2", "gpt_neox", "falcon", "phi3", "qwen3", "opt", "granite", "llama_bias", "gemma2")


def samples(tokens: int, features: int = 5, targets: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets that depend on them, and weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    y = x @ torch.arange(features * targets).view(features, targets).float() / 10
    y = y + torch.randn(tokens, targets, generator=generator)
    return x, y, torch.rand(tokens, generator=generator) + 0.1


def moments_of(x: Tensor, y: Tensor, weight: Tensor) -> Moments:
    """Moments of one batch."""
    moments = Moments.zeros(x.shape[1], y.shape[1], has_energy=True)
    moments.add(x, y, weight)
    return moments


def test_the_ridge_step_is_least_squares_on_an_augmented_system() -> None:
    x, y, weight = samples(40)
    root = weight.sqrt()[:, None].double()
    strength = 0.3
    damping = strength * (x.double() * root).pow(2).sum(0)
    rows = torch.cat([x.double() * root, damping.sqrt().diag()])
    wanted = torch.cat([y.double() * root, torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)])
    direct = torch.linalg.lstsq(rows, wanted).solution
    torch.testing.assert_close(solve_ridge(moments_of(x, y, weight), strength), direct, rtol=1e-5, atol=1e-6)


def test_moments_of_a_stream_are_those_of_the_whole() -> None:
    x, y, weight = samples(50)
    whole = moments_of(x, y, weight)
    streamed = Moments.zeros(x.shape[1], y.shape[1], has_energy=True)
    for part in torch.arange(50).split(7):
        streamed.add(x[part], y[part], weight[part])
    torch.testing.assert_close(streamed.gram_PP, whole.gram_PP, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(streamed.cross_PT, whole.cross_PT, rtol=1e-6, atol=1e-6)
    solution = torch.randn(x.shape[1], y.shape[1], dtype=torch.float64)
    metric = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    missed = (y.double() - x.double() @ solution) * torch.tensor([1.0, 2.0, 3.0])
    direct = (missed.pow(2).sum(-1) * weight).sum()
    assert streamed.error(solution, metric) == pytest.approx(direct.item(), rel=1e-5)


def test_the_ridge_step_does_not_depend_on_units() -> None:
    x, y, weight = samples(40)
    units = torch.tensor([1e-3, 1.0, 30.0, 1e3, 0.0])
    scaled = solve_ridge(moments_of(x * units, y, weight), 0.3)
    without_last = solve_ridge(moments_of(x[:, :4], y, weight), 0.3)
    torch.testing.assert_close(scaled[:4] * units[:4, None].double(), without_last, rtol=1e-4, atol=1e-4)
    assert not scaled[4].any()


def test_a_fit_that_does_not_carry_over_is_not_kept() -> None:
    x, y, weight = samples(60)
    fitted = moments_of(x, y, weight)
    assert fit_ridge(fitted, moments_of(*samples(60, seed=1))).kept
    errors = [moments_of(*samples(60, seed=1)).error(solve_ridge(fitted, strength)) for strength in STRENGTHS]
    assert fit_ridge(fitted, moments_of(*samples(60, seed=1))).after == min(errors)
    opposite = fit_ridge(fitted, moments_of(x, -y, weight))
    assert not opposite.kept
    assert opposite.after == opposite.before


@cache
def captured(family: str) -> Capture:
    """A model of the zoo."""
    return capture(SUPPORTED[family]())


@cache
def lowered(family: str, form: str) -> Program:
    """Its lane program of degree 2; nobody changes it."""
    return lower(captured(family).program, 2, form)[0]


def batches(seed: int, count: int) -> list[Tensor]:
    """Token ids."""
    return [random_tokens(96, 8, 24, seed=100 * seed + number) for number in range(count)]


def calibrated(family: str, form: str, memory: int = 1 << 30) -> Calibration:
    """A zoo model's lanes calibrated on random tokens."""
    program = lowered(family, form)
    inputs = list(map(inputs_function(program.inputs), batches(0, 8)))
    held = [number % 4 == 3 for number in range(8)]
    read_lane = read_from_source(program, captured(family).store.read)
    return calibrate(lowered(family, "standard"), program, read_lane, inputs, held, memory=memory)


def logits_of(program: Program, streaming: StreamingProgram) -> LogitsOf:
    """A language model."""
    return logits_function(program.inputs, program.call, streaming.run_flat)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_brings_lanes_closer_to_the_source(family: str) -> None:
    program, store = lowered(family, "kraken"), captured(family).store
    found = calibrated(family, "kraken")
    fits = [fit for branch in found.branches for fit in branch.fits]
    assert all(fit.error < 1 if fit.kept else fit.error == 1 for fit in fits)
    assert sum(fit.kept for fit in fits) > len(fits) / 2
    assert found.lines()[0].startswith(f"on 1,536 tokens: {sum(fit.kept for fit in fits)} of {len(fits)} fits")
    new, read = found.weights.in_program(program, store.read)
    source = logits_of(
        captured(family).program,
        StreamingProgram(captured(family).program, read_from_source(captured(family).program, store.read)),
    )
    unseen = batches(1, 3)
    before = evaluate(
        source, logits_of(program, StreamingProgram(program, read_from_source(program, store.read))), unseen, ""
    )
    after = evaluate(source, logits_of(new, StreamingProgram(new, read_from_source(new, read))), unseen, "")
    assert after.kl < before.kl
    assert has_lane_tensors(new.weights.values())
    assert not has_lane_tensors(program.weights.values())
    assert {name: spec.shape for name, spec in new.weights.items()} == {
        name: spec.shape for name, spec in program.weights.items()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom", "gemma2"])
def test_attention_received_is_what_the_model_says_of_itself(family: str) -> None:
    model = SUPPORTED[family]()
    model.set_attn_implementation("eager")
    ids = batches(3, 1)[0]
    with torch.no_grad():
        layers = model(ids, output_attentions=True).attentions
    wanted = torch.stack(layers).sum(-2).mean((0, 1, 2))
    program = lowered(family, "standard")
    read_lane = read_from_source(program, captured(family).store.read)
    found = attention_received(program, read_lane, inputs_function(program.inputs)(ids))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "adds"), [("llama", True), ("gemma2", False)])
def test_gaps_are_not_added_up_through_norms(family: str, adds: bool, tmp_path: Path) -> None:
    """What a norm makes of two streams' difference is not the difference that their next reads have."""
    standard, program = lowered(family, "standard"), lowered(family, "kraken")
    read_lane = read_from_source(program, captured(family).store.read)
    inputs = list(map(inputs_function(program.inputs), batches(0, 2)))
    values = Values(tmp_path, limit=1 << 30)
    runs = [Lockstep(one, read_lane, inputs, values, name) for one, name in ((standard, "source"), (program, "lanes"))]
    streams = Streams(standard, *runs, values, [False, True], [torch.ones(8 * 24)] * 2)
    for of_source, of_lanes in list(zip(find_refittable(standard), find_refittable(program), strict=True))[:3]:
        assert not isinstance(of_source, Rejection)
        assert not isinstance(of_lanes, Rejection)
        streams.settle(of_source.end, of_lanes.end)
    gap = streams.gap(1)
    assert bool(torch.as_tensor(gap).abs().max() > 0) == adds


def test_an_unchanged_form_is_left_alone() -> None:
    found = calibrated("llama", "standard")
    assert not found.weights.names
    assert {branch.note for branch in found.branches} == {"reads what the source reads"}
    program = lowered("llama", "standard")
    assert found.weights.in_program(program, captured("llama").store.read)[0].weights == program.weights


def test_calibration_is_deterministic_and_may_wait_on_disk() -> None:
    in_memory, on_disk = calibrated("llama", "kraken"), calibrated("llama", "kraken", memory=0)
    assert in_memory.weights.names == on_disk.weights.names
    for name in in_memory.weights.names:
        spec = lowered("llama", "kraken").weights[name]
        for lane in range(2):
            assert torch.equal(in_memory.weights.read_lane(spec, lane), on_disk.weights.read_lane(spec, lane))


def test_lockstep_computes_what_a_whole_run_computes(tmp_path: Path) -> None:
    program = lowered("gpt_neox", "kraken")
    read_lane = read_from_source(program, captured("gpt_neox").store.read)
    inputs = list(map(inputs_function(program.inputs), batches(0, 2)))
    lockstep = Lockstep(program, read_lane, inputs, Values(tmp_path, limit=10_000), "run")
    nodes = {node.name: node for node in program.graph.nodes}
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output").all_input_nodes[0]
    for branch in program.layers.branches:
        assert len(list(lockstep.advance([nodes[branch.output]]))) == 2
    for values, flat in zip(lockstep.advance([output]), inputs, strict=True):
        whole = StreamingProgram(program, read_lane).run_flat(flat)[0]
        value = values[output]
        assert torch.equal(value, whole) or torch.equal(torch.cat(value, dim=-1), whole)


def test_weights_that_belong_to_several_parts_are_left_alone() -> None:
    program = lowered("llama", "kraken").copy()
    found = find_refittable(program)
    assert not any(isinstance(entry, Rejection) for entry in found)
    first, second = found[0], found[2]
    assert not isinstance(first, Rejection)
    assert not isinstance(second, Rejection)
    shared = first.output.node.args[1]
    second.output.node.args = (second.output.node.args[0], shared)
    rejected = find_refittable(program)
    assert [number for number, entry in enumerate(rejected) if isinstance(entry, Rejection)] == [0, 2]
