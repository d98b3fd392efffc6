"""Embeddings of which a lane has its own rows: what it holds, on real ranks of every backend, calibrated and healed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kraken_compiler
from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.onnx_ort.format import device_file
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.heal import heal_artifact
from kraken_compiler.commands.source import lowered_as, source_of
from kraken_compiler.commands.transform import load_lanes
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import LaneProgram, parameter_count
from kraken_compiler.ir.schedule import AUTO
from kraken_compiler.ir.shards import SPLIT, WHOLE
from kraken_compiler.ir.weight_table import WeightSpec
from kraken_compiler.passes.lower import lower
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.quality.budget import Payloads, traffic
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.training.distillation import Distillation
from kraken_compiler.verify.report import make_report
from kraken_compiler.weights.io.safetensors_format import read_header
from tests.healing_models import captured, rows, trainer_for
from tests.zoo import SUPPORTED

VOCABULARY, WIDTH = 97, 64
TIED, UNTIED = "gemma3", "llama"


def lowered(family: str, degree: int, embedding: str = AUTO, form: str = "standard") -> LaneProgram:
    return lower(captured(family).program, degree, form, embedding=embedding, cached=False)[0]


def vocabularies(weights: list[WeightSpec]) -> list[WeightSpec]:
    """The rows of the weight table that are a vocabulary's, or of two lanes' own rows with their padding."""
    return [spec for spec in weights if spec.source_shape in ((VOCABULARY, WIDTH), (VOCABULARY + 1, WIDTH))]


@pytest.mark.parametrize(("family", "tables"), [(TIED, 1), (UNTIED, 2)])
def test_what_a_lane_holds(family: str, tables: int) -> None:
    """A lane of a tied model held all rows, and its share of them again."""
    split, whole = (lowered(family, 2, embedding) for embedding in (AUTO, WHOLE))
    share = -(-VOCABULARY // 2)
    assert [spec.shape for spec in vocabularies([*split.weights.values()])] == [(share, WIDTH)] * tables
    saved = VOCABULARY if family == TIED else VOCABULARY - share
    assert parameter_count(whole) - parameter_count(split) == saved * WIDTH
    assert vocabulary(split) == vocabulary(whole) == VOCABULARY
    assert (make_report(split).data["embedding"], make_report(whole).data["embedding"]) != ([], [])
    assert "1 reduce more, 256 bytes/token, where the stream begins" in make_report(split).text
    assert "own rows of the embedding" not in make_report(whole).text


def test_a_choice_that_there_is_not() -> None:
    for ask in (
        lambda: lower(captured(UNTIED).program, 2, embedding="rows"),
        lambda: kraken_compiler.transform(SUPPORTED[UNTIED](), 2, embedding="rows"),
        lambda: compile_model(SUPPORTED[UNTIED](), None, degree=2, embedding="rows"),
    ):
        with pytest.raises(UsageError, match="--embedding rows: choose from auto, split, whole"):
            ask()


def test_transform_keeps_it_whole_if_asked() -> None:
    modules = [kraken_compiler.transform(SUPPORTED[TIED](), 2, "standard", embedding=one) for one in (SPLIT, WHOLE)]
    shapes = [sorted(tuple(one.shape) for one in module.parameters() if {49, 97} & {*one.shape}) for module in modules]
    assert shapes == [[(2, 49, WIDTH)], [(2, 49, WIDTH), (97, WIDTH)]]


def test_the_budget_counts_the_sum_as_waited_for() -> None:
    split, whole = (lowered(UNTIED, 2, embedding) for embedding in (SPLIT, WHOLE))
    payloads = [Payloads.of(program.plan) for program in (split, whole)]
    assert [one.lookups for one in payloads] == [WIDTH * 4, 0]
    assert payloads[0].part == payloads[1].part
    forms = ["kraken"] * len(split.layers.layers)
    more, fewer = (traffic(split.layers.branches, forms, one) for one in payloads)
    assert more.standard - fewer.standard == more.sent - fewer.sent == WIDTH * 4
    assert more.hidden == fewer.hidden
    assert more.standard == sum(reduce.bytes_per_token for reduce in split.plan.reduces)


def stored_shapes(artifact: Artifact, file: str) -> list[tuple[int, ...]]:
    return [
        tuple(entry.shape) for entry in read_header(artifact.path(f"lanes/{file}")).values() if len(entry.shape) == 2
    ]


# On real ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("family", "degree", "form"), [(TIED, 3, "standard"), (TIED, 2, "kraken"), (UNTIED, 3, "kraken")]
)
def test_ranks_and_devices(family: str, degree: int, form: str, tmp_path: Path) -> None:
    """Compiled for both backends, checked on real ranks and devices with caches and halves, and verified again."""
    source, out = tmp_path / "source", tmp_path / "out.kraken"
    SUPPORTED[family]().save_pretrained(source)
    result = compile_model(source, out, degree=degree, form=form, backends=("torch", "onnx"))
    assert result.verification is not None
    artifact = open_artifact(out)
    share = (-(-VOCABULARY // degree), WIDTH)
    for lane in range(degree):
        held = stored_shapes(artifact, f"lane-{lane}.safetensors")
        assert held.count(share) == (1 if family == TIED else 2)
    assert all(VOCABULARY not in shape for shape in stored_shapes(artifact, "shared.safetensors"))
    assert artifact.manifest.plan.reduces[0].is_lookup
    assert artifact.manifest.options.get("embedding") is None
    verify_artifact(out)
    assert vocabulary(lowered_as(source_of(artifact), artifact.manifest)) == VOCABULARY


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_whole_embedding_is_noted_and_made_again(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out.kraken"
    SUPPORTED[TIED]().save_pretrained(source)
    compile_model(source, out, degree=2, embedding="whole")
    artifact = open_artifact(out)
    assert artifact.manifest.options["embedding"] == "whole"
    assert not any(reduce.is_lookup for reduce in artifact.manifest.plan.reduces)
    assert (VOCABULARY, WIDTH) in stored_shapes(artifact, "shared.safetensors")
    program = lowered_as(source_of(artifact), artifact.manifest)
    assert [*program.weights] == [spec.name for spec in artifact.manifest.weights]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quantized_head_is_looked_up_in(tmp_path: Path) -> None:
    """On ONNX devices: the tied table is there once, in 8 bits, and is what the check against the lanes rounds."""
    source, out = tmp_path / "source", tmp_path / "out.kraken"
    SUPPORTED[TIED]().save_pretrained(source)
    result = compile_model(source, out, degree=2, form="standard", backends=("onnx",), onnx_weights="int4")
    assert result.verification is not None
    assert all(comparison.passed for comparison in result.verification.comparisons)
    proto = DeviceModel.load(out / "lanes" / device_file(0)).proto
    stored = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    gathered = [
        stored[node.input[0]] for node in proto.graph.node if node.op_type == "Gather" and node.input[0] in stored
    ]
    assert [49, 1, 128] in gathered, "integers of 49 rows, a block each"
    assert [49, WIDTH] not in stored.values()


# Calibrated and healed -----------------------------------------------------------------------------------------------


SETTINGS = HealSettings(steps=2, batch=2, learning_rate=3e-3, precision="float32")


@pytest.mark.slow
def test_healing_trains_a_tied_table_once() -> None:
    """Its gradient is that of the source's, of the lookups and of the head together; its padding stays zero."""
    trainer = trainer_for(TIED, "standard", SETTINGS)
    (spec,) = vocabularies([*trainer.parameters.table.values()])
    parameter = trainer.parameters.trained()[f"{spec.name}.weight"]
    ids = rows(2)
    teacher = torch.randn(ids.numel(), VOCABULARY, generator=torch.Generator().manual_seed(1))
    trainer.objective = Distillation(lambda _: teacher.view(*ids.shape, VOCABULARY).clone())
    trainer.loss(ids).backward()
    source = SUPPORTED[TIED]()
    logs = source(ids).logits.log_softmax(-1).flatten(0, 1)
    loss = torch.nn.functional.kl_div(logs, teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    loss.backward()
    assert parameter.grad is not None
    have = parameter.grad.flatten(0, 1)
    want = source.get_input_embeddings().weight.grad
    torch.testing.assert_close(have[:VOCABULARY], want, rtol=1e-4, atol=1e-6)
    trainer.step(ids, 1e-2)
    trained: Tensor = parameter.detach().flatten(0, 1)
    assert not trained[VOCABULARY:].any()


@pytest.mark.slow
def test_low_rank_updates_of_a_tied_table_are_one() -> None:
    pytest.importorskip("peft")
    trainer = trainer_for(TIED, "kraken", replace(SETTINGS, lora=2))
    (spec,) = vocabularies([*trainer.parameters.table.values()])
    assert len([name for name in trainer.parameters.trained() if name.startswith(f"{spec.name}.")]) == 2
    before = trainer.step(rows(2), 1e-2).loss
    for _ in range(5):
        after = trainer.step(rows(2), 1e-2).loss
    assert after < before


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_calibrated_and_healed_artifacts_keep_the_tie(tmp_path: Path) -> None:
    source, out, healed = (tmp_path / name for name in ("source", "out.kraken", "healed.kraken"))
    SUPPORTED[TIED]().save_pretrained(source)
    text = tmp_path / "text.npy"
    np.save(text, rows(64, 32).numpy())
    compile_model(source, out, degree=2, calibrate=[text], calibrate_tokens=1024)
    settings = HealSettings(steps=2, batch=2, sequence=16, learning_rate=1e-3, precision="float32")
    heal_artifact(out, settings, tokens=[text], output=healed)
    for place in (out, healed):
        artifact = open_artifact(place)
        (spec,) = vocabularies([*artifact.manifest.weights])
        assert spec.shape == (49, WIDTH)
        lanes = load_lanes(place)
        assert vocabulary(lanes.program) == VOCABULARY
        graph = json.loads(artifact.path("lanes/lane.json").read_text())
        assert sum(spec.name in node["args"] for node in graph["nodes"]) == 2, "the lookup and the head"
