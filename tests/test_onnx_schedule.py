"""What devices really run between start and wait: read from ONNX Runtime's profile, checked, and shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.check.check_run import is_matrix_product, ran_windows
from kraken_compiler.backends.onnx_ort.check.graph_windows import measure_windows
from kraken_compiler.backends.onnx_ort.check.ort_profile import last_run
from kraken_compiler.backends.onnx_ort.format import DOMAIN, LOGITS, START, WAIT, device_file
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import Array, DeviceProgram
from kraken_compiler.backends.onnx_ort.run.events import Event, events_from
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.errors import InputFileError, VerificationError
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.schedule import RanWindow, Window
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.overlap import require_run_overlap
from kraken_compiler.verify.verification import Reference, Verification, verify_programs
from tests.test_families import lane_program, recognized
from tests.zoo import token_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

NAME, DEGREE = "llama", 2
Run = tuple[Array, tuple[Event, ...]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers in Kraken form, for ONNX alone."""
    target = tmp_path_factory.mktemp("schedule") / "kraken"
    program = lane_program(NAME, DEGREE, "kraken")
    source = Source(kind="module", name=NAME)
    return write_artifact(program, recognized(NAME).read, target, source=source, backends=[OnnxBackend()])


def profiled(directory: Path) -> list[Run]:
    """Logits and events of every device; the second run is the one that is looked at."""
    ids = token_batch(recognized(NAME).model, 2, 9).numpy()

    def act(collectives: Ranks) -> Run:
        model = DeviceModel.load(directory / device_file(collectives.rank), verify=False)
        program = DeviceProgram(model, collectives, threads=1, profiled=True)
        feeds = whole_feeds(model, {"input_ids": ids})
        before = program.run(feeds)[LOGITS].copy()
        outputs, events = program.run_profiled(feeds)
        assert np.array_equal(before, outputs[LOGITS])
        assert np.array_equal(before, program.run(feeds)[LOGITS]), "it runs on after its profile has ended"
        return before, events

    found: list[Run] = together(DEGREE, act)
    return found


def windows_of(directory: Path) -> tuple[Window, ...]:
    """Those of device 0's file, with the promises of the form."""
    proto = DeviceModel.load(directory / device_file(0), verify=False).proto
    return measure_windows(onnx_ir.from_proto(proto).graph, lane_program(NAME, DEGREE, "kraken").plan)


@pytest.fixture(scope="module")
def runs(artifact: Path) -> list[Run]:
    return profiled(artifact / "lanes")


def measured(directory: Path, runs: list[Run]) -> list[tuple[RanWindow, ...]]:
    return [ran_windows(events, windows_of(directory)) for _, events in runs]


def test_products_run_between_start_and_wait_on_every_device(artifact: Path, runs: list[Run]) -> None:
    devices = measured(artifact / "lanes", runs)
    require_run_overlap(devices)
    for windows in devices:
        # The first is of the embedding's rows.
        assert [bool(one.window.promised) for one in windows] == [False, True, True, False]
        for one in windows[1:-1]:
            names = {node.name for node in (*one.products, *one.attentions)}
            assert names == set(one.window.gemms)
            assert {node.op for node in one.products} == {"FusedMatMul"}
            assert (len(one.products), len(one.attentions)) == (4, 1)
            assert one.hiding_us > 0
        for one in (windows[0], windows[-1]):
            assert (one.products, one.attentions) == ((), ())
        assert all(one.start_us < other.start_us for one, other in pairwise(windows))
        assert all(one.wait_us >= 0 for one in windows)


def test_the_nodes_are_those_that_onnx_runtime_executed(runs: list[Run]) -> None:
    """It fuses activations and counts from the last run alone."""
    for _, events in runs:
        file = [node for event in events for node in event.nodes]
        ran = [node for event in events for node in event.ran]
        assert 0 < len(ran) < len(file)
        assert any("Fusion" in node.name for node in ran)
        assert len({node.name for node in ran}) == len(ran), "nodes of an earlier run are among them"


def test_events_travel_as_json(runs: list[Run]) -> None:
    text = json.dumps([asdict(event) for event in runs[0][1]])
    assert events_from(json.loads(text)) == runs[0][1]


# what is wrong -------------------------------------------------------------------------------------------------------


def move_waits_up(path: Path) -> None:
    """Put every wait right behind its start, and let it depend on nothing else."""
    proto = onnx.load_model(str(path), load_external_data=False)
    nodes = []
    waits = {node.input[0]: node for node in proto.graph.node if node.domain == DOMAIN and node.op_type == WAIT}
    for node in proto.graph.node:
        if node.domain == DOMAIN and node.op_type == WAIT:
            continue
        nodes.append(node)
        if node.domain == DOMAIN and node.op_type == START:
            wait = waits[node.output[0]]
            del wait.input[1:]
            nodes.append(wait)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path.write_bytes(proto.SerializeToString())


def test_a_device_that_waits_early_is_found_though_its_numbers_are_right(
    artifact: Path, runs: list[Run], tmp_path: Path
) -> None:
    files = Path(shutil.copytree(artifact / "lanes", tmp_path / "files"))
    move_waits_up(files / device_file(1))
    moved = profiled(files)
    for (want, _), (have, _) in zip(runs, moved, strict=True):
        assert np.array_equal(want, have)
    devices = measured(files, moved)
    require_run_overlap(devices[:1])
    with pytest.raises(VerificationError) as caught:
        require_run_overlap(devices)
    assert str(caught.value) == (
        "2 of 4 reduces lost their overlap in the run: no matrix product was executed between start and wait "
        "of reduce 1 (AllReduceStart to AllReduceWait) on rank 1, "
        "reduce 2 (AllReduceStart_1 to AllReduceWait_1) on rank 1"
    )


def test_a_run_of_other_reduces_is_refused(artifact: Path, runs: list[Run]) -> None:
    windows = windows_of(artifact / "lanes")
    _, events = runs[0]
    with pytest.raises(
        VerificationError, match=r"ran the AllReduceStart nodes \S*/AllReduceStart, .*; its file has Other"
    ):
        ran_windows(events, (replace(windows[0], start="Other"), *windows[1:]))
    with pytest.raises(VerificationError, match="ran the AllReduceWait nodes"):
        ran_windows([event for event in events if event.name != "AllReduceWait"], windows)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '[{"name": "model_run"}]', '[{"cat": "Node", "name": "x"}]'])
def test_a_profile_that_is_none(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(VerificationError, match="profile of the run cannot be read"):
        last_run(path)


def test_fused_products_count() -> None:
    products = ("MatMul", "FusedMatMul", "MatMulNBits", "DynamicQuantizeMatMul", "Gemm", "FusedGemm", "QGemm")
    assert all(map(is_matrix_product, products))
    assert not any(map(is_matrix_product, ("Attention", "Add", "QuickGelu", "Softmax")))


# the whole verification ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verification(artifact: Path) -> Verification:
    """Of real ranks."""
    return verify_programs(artifact, ((1, 5), (2, 9)), lanes=reference(lane_program(NAME, DEGREE, "kraken")))


def reference(program: Program) -> Reference:
    return Reference(program, read_from_source(program, recognized(NAME).read))


def test_devices_are_verified_with_their_own_profile(verification: Verification) -> None:
    verification.require_passed()
    assert [one.sizes for one in verification.comparisons] == [(1, 5), (1, 5), (2, 9), (2, 9)]
    schedule = json.loads(json.dumps(verification.to_dict()))["schedule"]
    assert [len(entry["devices"]) for entry in schedule] == [DEGREE] * 4
    for entry in schedule[1:-1]:
        for device in entry["devices"]:
            names = [node["name"] for node in device["products"] + device["attentions"]]
            assert sorted(names) == sorted(entry["gemms"])
            assert all(node["microseconds"] >= 0 for node in device["products"])
            assert device["start_us"] > 0
            assert device["wait_us"] >= 0


def test_the_schedule_for_people(verification: Verification) -> None:
    assert any(
        "ran at least 4 matrix products between start and wait of each hidden" in one for one in verification.lines()
    )
    title, header, *rows = verification.schedule_lines()
    assert title.startswith("one run of batch 2 x 9, in us")
    assert header.split()[:3] == ["reduce", "device", "start"]
    assert len(rows) == 4
    assert "nothing" in rows[0], "the embedding's rows"
    assert "model.layers.1.self_attn  k_proj " in rows[1]
    assert "Attention" in rows[1]
    assert "nothing" in rows[-1]
    _, *rows = replace(verification, checks=()).schedule_lines()
    assert rows[1].split()[:2] == ["1", "AllReduceStart"]
    assert "model.layers.1.self_attn.q_proj/MatMul" in rows[1]


def test_files_are_read_once(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    load = DeviceModel.load
    monkeypatch.setattr(DeviceModel, "load", lambda path, **options: read.append(path.name) or load(path, **options))
    verify_programs(artifact)
    assert read == [device_file(0), device_file(1)]


def test_files_of_different_compiles_are_refused(artifact: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(artifact, tmp_path / "mixed"))
    shutil.copy(mixed / "lanes" / device_file(0), mixed / "lanes" / device_file(1))
    with pytest.raises(InputFileError, match=r"device-1\.onnx: is not device 1 of 2 of this compile"):
        OnnxBackend().schedule(open_artifact(mixed, verify=False))


def test_one_device_has_no_reduces_to_check(tmp_path: Path) -> None:
    program, _ = lower(recognized(NAME).captured, 1, "standard")
    source = Source(kind="module", name=NAME)
    made = write_artifact(program, recognized(NAME).read, tmp_path / "one", source=source, backends=[OnnxBackend()])
    found = verify_programs(made, ((2, 5),), lanes=reference(program))
    found.require_passed()
    assert len(found.comparisons) == 2
    (check,) = found.checks
    assert (found.windows, check.runs) == ((), ())
