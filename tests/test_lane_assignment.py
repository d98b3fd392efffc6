"""Lanes by affinity: the arithmetic, what it does to a trained model, and how artifacts remember it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kraken_compiler.artifact.manifest import AssignmentRecord
from kraken_compiler.artifact.packed_sets import packed, unpacked
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.registry import require_lanes
from kraken_compiler.capture import Capture, capture
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.heal import heal_artifact
from kraken_compiler.commands.transform import transform
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.forms import FORMS
from kraken_compiler.ir.index_set import from_indices
from kraken_compiler.lanes.evaluate import evaluate
from kraken_compiler.lanes.logits import lane_logits
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.form.derive_schedule import derive_plan
from kraken_compiler.passes.lower import lower_split, split_source
from kraken_compiler.passes.shard.assign_lanes import Units, units_of
from kraken_compiler.passes.stages import recognize
from kraken_compiler.quality.assignment.choose import Reading, choose_lanes, units_of_lanes
from kraken_compiler.quality.assignment.on_model import LaneChoice
from kraken_compiler.quality.assignment.reads import Reads, measure_reads, withheld
from kraken_compiler.quality.assignment.transport import best_lanes
from kraken_compiler.quality.healing.settings import HealSettings
from tests.zoo import SUPPORTED, token_batch


@pytest.mark.parametrize(("units", "sizes"), [(6, (2, 2, 2)), (7, (3, 4)), (6, (1, 2, 3)), (5, (5,))])
def test_transport_is_exact(units: int, sizes: tuple[int, ...]) -> None:
    """Against all assignments there are."""
    scores = np.random.default_rng(units).random((units, len(sizes))) + np.random.default_rng(1).random(len(sizes))
    lanes = best_lanes(scores, sizes)
    assert np.bincount(lanes, minlength=len(sizes)).tolist() == list(sizes)
    slots = np.repeat(np.arange(len(sizes)), sizes)
    best = max(scores[np.arange(units), list(order)].sum() for order in set(itertools.permutations(slots.tolist())))
    assert scores[np.arange(units), lanes].sum() == pytest.approx(best)


def test_what_lanes_miss() -> None:
    branches = recognize(_captured("llama").program).layers.branches[:6]

    def of(form: str) -> dict[int, tuple[int, ...]]:
        return withheld(derive_plan(branches, [FORMS[form]] * 3))

    assert of("kraken") == {2: (1,), 3: (1, 2), 4: (3,), 5: (3, 4), 6: (5,)}
    assert of("delayed") == {2: (1,), 3: (2,), 4: (3,), 5: (4,), 6: (5,)}
    assert of("sync-drop") == {2: (1,), 4: (3,), 6: (5,)}
    assert not of("ladder")
    assert not of("standard")


def _captured(name: str) -> Capture:
    model = SUPPORTED[name]()
    return capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})


def _planned(source: Capture, degree: int) -> tuple[object, dict[int, Units]]:
    found: list[object] = []

    def keep(planned: object) -> dict[int, object]:
        found.append(planned)
        return {}

    split_source(source.program, degree, assign=keep)  # type: ignore[arg-type]
    (planned,) = found
    pairs = zip(planned.layers.branches, planned.shards, strict=True)  # type: ignore[attr-defined]
    units = {branch.index: units_of(branch, plan) for branch, plan in pairs}
    return planned, {number: one for number, one in units.items() if isinstance(one, Units)}


def test_reads_find_the_columns_that_read_a_head() -> None:
    """Gate and up rows of the first half of the columns are nothing but what the first head writes, of the others
    what the second does: these lanes are found, and none of the energy lies between them."""
    model = SUPPORTED["llama"]()
    layer = model.model.layers[0]
    width = layer.self_attn.head_dim
    heads = layer.self_attn.o_proj.in_features // width
    columns = layer.mlp.gate_proj.out_features
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(columns, generator=generator)
    with torch.no_grad():
        shape = layer.self_attn.o_proj.weight.shape
        basis, _ = torch.linalg.qr(torch.randn(shape, generator=generator))
        layer.self_attn.o_proj.weight.copy_(0.3 * basis)
        for number, column in enumerate(order.tolist()):
            head = number * heads // columns
            direction = basis[:, head * width : (head + 1) * width] @ torch.randn(width, generator=generator)
            layer.mlp.gate_proj.weight[column] = direction
            layer.mlp.up_proj.weight[column] = direction
        layer.post_attention_layernorm.weight.fill_(1.0)
    source = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    planned, units = _planned(source, 2)
    reads = measure_reads(
        planned,  # type: ignore[arg-type]
        units,
        {2: (1,)},
        read_from_source(planned, source.store.read),  # type: ignore[arg-type]
        [[token_batch(model, 4, 16)]],
    )
    (one,) = reads
    reading = Reading(reads, units)
    lanes = choose_lanes(reading)
    assert reading.found(lanes) > 0.95 > 0.7 > reading.found(reading.in_order())
    groups = units[1].count
    owner = {int(column): int(number * heads // columns * groups // heads) for number, column in enumerate(order)}
    assert all(lanes[2][column] == lanes[1][group] for column, group in owner.items())
    assert one.energy.shape == (columns, groups)
    assert one.energy.min() >= 0


def test_choosing_never_finds_less() -> None:
    generator = np.random.default_rng(0)
    _, units = _planned(_captured("llama"), 2)
    pairs = [(2, 1), (3, 1), (3, 2), (4, 3)]
    reads = [
        Reads(reader, source, torch.from_numpy(generator.random((units[reader].count, units[source].count)) ** 8))
        for reader, source in pairs
    ]
    reading = Reading(reads, units)
    lanes = choose_lanes(reading)
    assert reading.found(lanes) > reading.found(reading.in_order())
    for number, found in lanes.items():
        assert [len(lane) for lane in units_of_lanes(found, 2)] == [len(lane) for lane in units[number].lanes]


def _kl(source: Capture, lanes: str, form: str, batches: list[Tensor]) -> float:
    choice = LaneChoice(source, form) if lanes == "affinity" else None
    split = split_source(source.program, 4, assign=choice)
    program = lower_split(split, form, cached=False)
    logits = lane_logits(source.program, read_from_source(source.program, source.store.read))
    quality = evaluate(logits, lane_logits(program, read_from_source(program, source.store.read)), batches, "numbers")
    return quality.kl


def test_it_lowers_the_kl_of_a_trained_gpt2_and_not_that_of_standard(microformer: Path) -> None:
    """The packaged GPT-2 of microbe genera, by random inputs alone."""
    source = capture(microformer, trust_pickle=True)
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randint(4, 1000, (4, 32), generator=generator) for _ in range(4)]
    for form in ("kraken", "delayed"):
        assert _kl(source, "affinity", form, batches) < 0.9 * _kl(source, "order", form, batches)
    assert _kl(source, "affinity", "standard", batches) < 1e-6


def test_index_sets_are_packed() -> None:
    few = ((0, 3), (5, 9))
    assert packed(few, 12) == few
    many = from_indices(range(0, 1001, 3))
    text = packed(many, 1001)
    assert isinstance(text, str)
    assert unpacked(text, 1001) == many
    for size in (990, 1009):
        with pytest.raises(ValueError, match="positions are not those of"):
            unpacked(text, size)
    for damaged in (text[:-4], "no base64!", text[::-1]):
        with pytest.raises(ValueError, match="positions are"):
            unpacked(damaged, 1001)
    with pytest.raises(ValueError, match="do not share the 4 units"):
        AssignmentRecord(branch=1, units=4, lanes=(((0, 2),), ((1, 4),)))
    with pytest.raises(ValueError, match="more than the 4 units"):
        AssignmentRecord(branch=1, units=4, lanes=(((0, 2),), ((2, 1 << 40),)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_artifact_remembers_its_lanes(tmp_path: Path, backend: str) -> None:
    """What verifies it lowers the source with the same lanes, and the manifest stays small."""
    model = SUPPORTED["llama"]()
    model.save_pretrained(tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", degree=2, lanes="affinity", backends=(backend,))
    artifact = open_artifact(tmp_path / "out")
    assert artifact.manifest.assignment
    assert verify_artifact(tmp_path / "out").comparisons
    compile_model(tmp_path / "model", tmp_path / "order", degree=2, backends=(backend,))
    assert not open_artifact(tmp_path / "order").manifest.assignment
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["assignment"][1]["lanes"].reverse()
    manifest["assignment"][1]["lanes"][0] = manifest["assignment"][1]["lanes"][1]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputFileError, match="do not share"):
        open_artifact(tmp_path / "out")


def test_choices_are_checked() -> None:
    with pytest.raises(UsageError, match="--lanes best: choose from order, affinity"):
        transform(SUPPORTED["llama"](), 2, lanes="best")


@pytest.mark.slow
def test_healing_keeps_the_lanes(tmp_path: Path) -> None:
    """ALiBi's slopes belong to heads and are no weights that training would bring along: a healed artifact is the one
    that was healed, but for its weights, and verifies."""
    model = SUPPORTED["bloom"]()
    model.save_pretrained(tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", degree=2, lanes="affinity")
    before = open_artifact(tmp_path / "out").manifest
    assert before.assignment
    ids = torch.cat([token_batch(model, 4, 32, seed) for seed in range(16)])
    np.save(tmp_path / "ids.npy", ids.numpy())
    settings = HealSettings(steps=1, batch=2, sequence=32, learning_rate=1e-9, evaluate_tokens=64)
    heal_artifact(tmp_path / "out", settings, tokens=[tmp_path / "ids.npy"], output=tmp_path / "healed")
    after = open_artifact(tmp_path / "healed")
    assert after.manifest.assignment == before.assignment
    lanes = [require_lanes(open_artifact(tmp_path / name)) for name in ("out", "healed")]
    one, other = (lane_logits(found.program, found.read_lane)(ids[:2]) for found in lanes)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert verify_artifact(tmp_path / "healed").comparisons
