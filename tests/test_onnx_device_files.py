"""Device files: what is in them, and that a damaged one is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend, OnnxOptions
from kraken_compiler.backends.onnx_ort.check.check_run import is_matrix_product
from kraken_compiler.backends.onnx_ort.check.graph_windows import is_gemm
from kraken_compiler.backends.onnx_ort.format import (
    DOMAIN,
    LOGITS,
    META_FILES,
    META_FORMAT,
    OPSET,
    START,
    WAIT,
    data_file,
    device_file,
)
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.cut_model import Stage, cut
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram, Event
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ir.source_reader import SourceReader
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.thread_ranks import alone, together
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.weights.io.safetensors_format import read_header
from kraken_compiler.weights.lane_file_names import SHARED_FILE, lane_file_name
from kraken_compiler.weights.shard_journal import JOURNAL
from tests.test_families import lane_program, recognized, relative_error
from tests.zoo import logits_of, token_batch

pytestmark = pytest.mark.slow

NAME, DEGREE = "llama", 2


@pytest.fixture(scope="module")
def kraken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kraken")
    OnnxBackend().write(lane_program(NAME, DEGREE, "kraken"), recognized(NAME).read, directory)
    return directory


@pytest.fixture
def files(kraken: Path, tmp_path: Path) -> Path:
    """Device files of which anything may be changed."""
    return Path(shutil.copytree(kraken, tmp_path / "files"))


def test_the_checker_takes_them(kraken: Path) -> None:
    for device in range(DEGREE):
        onnx.checker.check_model(str(kraken / device_file(device)))
        model = DeviceModel.load(kraken / device_file(device))
        assert (model.lane, model.degree, set(model.forms)) == (device, DEGREE, {"kraken"})


def test_every_device_has_the_same_graph_and_its_own_weights(kraken: Path) -> None:
    models = [DeviceModel.load(kraken / device_file(device)) for device in range(DEGREE)]
    assert models[0].program == models[1].program
    assert models[0].proto.graph.node == models[1].proto.graph.node
    assert (kraken / lane_file_name(0)).read_bytes() != (kraken / lane_file_name(1)).read_bytes()


def test_what_all_devices_hold_whole_lies_in_one_file(kraken: Path) -> None:
    table = lane_program(NAME, DEGREE, "kraken").weights
    for device in range(DEGREE):
        weights = DeviceModel.load(kraken / device_file(device)).proto.graph.initializer
        files = {
            weight.name: next(entry.value for entry in weight.external_data if entry.key == "location")
            for weight in weights
            if weight.external_data and weight.name in table
        }
        assert {name for name, file in files.items() if file == SHARED_FILE} == {
            name for name in files if table[name].shared
        }
        assert set(files.values()) == {lane_file_name(device), SHARED_FILE}
        tables = [weight for weight in weights if weight.external_data and weight.name not in table]
        assert {weight.external_data[0].value for weight in tables} == {data_file(device)}
    lanes = [lane_file_name(device) for device in range(DEGREE)]
    names = {path.name for path in kraken.iterdir()} - {JOURNAL, *map(device_file, range(DEGREE))}
    assert names == {*lanes, SHARED_FILE, *map(data_file, range(DEGREE))}


@pytest.mark.parametrize("weights", [None, "int4"])
def test_both_backends_read_the_same_weights(tmp_path: Path, weights: str | None) -> None:
    """No weight is stored twice, whoever is named first."""
    program, read = lane_program(NAME, DEGREE, "kraken"), recognized(NAME).read
    source = Source(kind="module", name=NAME)
    backends = [OnnxBackend(OnnxOptions(onnx_weights=weights)), TorchBackend()]
    both = write_artifact(program, read, tmp_path / "both", source=source, backends=backends)
    torch_alone = write_artifact(program, read, tmp_path / "torch", source=source, backends=[TorchBackend()])
    open_artifact(both)
    for name in (*map(lane_file_name, range(DEGREE)), SHARED_FILE):
        assert (both / "lanes" / name).read_bytes() == (torch_alone / "lanes" / name).read_bytes()
    for device in range(DEGREE):
        assert DeviceModel.load(both / "lanes" / device_file(device)).weights == weights
        assert not read_header(both / "lanes" / data_file(device)).keys() & program.weights.keys()


def test_lane_files_that_are_there_are_used_if_they_are_whole(kraken: Path, files: Path) -> None:
    program, read = lane_program(NAME, DEGREE, "kraken"), recognized(NAME).read
    asked: list[str] = []

    def noted(name: str) -> torch.Tensor:
        asked.append(name)
        return read(name)

    def write() -> list[str]:
        asked.clear()
        OnnxBackend().write(program, SourceReader(noted, read.rows_of), files)
        assert all((files / path.name).read_bytes() == path.read_bytes() for path in kraken.glob("lane-*"))
        return list(asked)

    read_for_tables = write()
    assert len(set(read_for_tables)) < len(program.weights) // 2
    content = bytearray((files / lane_file_name(1)).read_bytes())
    content[-1] ^= 1
    (files / lane_file_name(1)).write_bytes(content)
    assert len(write()) > len(read_for_tables)
    (files / SHARED_FILE).unlink()
    assert len(write()) > len(read_for_tables)


def test_attention_stays_one_node_and_keeps_its_heads(kraken: Path) -> None:
    graph = DeviceModel.load(kraken / device_file(0)).proto.graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Attention") == len(recognized(NAME).program.layers.layers)
    # Keys are not repeated for the heads that share them.
    assert not {"Expand", "Tile"} & {node.op_type for node in graph.node[: kinds.index("Attention")]}


def test_a_wait_comes_after_the_products_of_its_window_for_everybody(kraken: Path) -> None:
    graph = DeviceModel.load(kraken / device_file(0)).proto.graph
    producer = {name: node for node in graph.node for name in node.output}
    waits = [node for node in graph.node if node.domain == DOMAIN and node.op_type == WAIT]
    pinned = [wait for wait in waits if len(wait.input) == 2]
    # The first one, of the embedding's rows, and the last one have nothing to hide behind.
    assert pinned == waits[1:-1]
    assert {producer[wait.input[1]].op_type for wait in pinned} <= {"MatMul", "Gemm"}


def test_shards_are_annotated(kraken: Path) -> None:
    proto = DeviceModel.load(kraken / device_file(1)).proto
    (configuration,) = proto.configuration
    assert (configuration.num_devices, list(configuration.device)) == (DEGREE, ["device-0", "device-1"])
    specs = {
        spec.tensor_name: spec
        for node in proto.graph.node
        for one in node.device_configurations
        for spec in one.sharding_spec
    }
    held = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    transposes = [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in held]
    held |= {node.output[0]: held[node.input[0]][::-1] for node in transposes}
    assert {node.output[0] for node in transposes} <= specs.keys()
    for name, spec in specs.items():
        for dim in spec.sharded_dim:
            (sharding,) = dim.simple_sharding
            # A vocabulary that the devices do not divide is padded.
            assert (held[name][dim.axis], DEGREE) == (-(-sharding.dim_value // DEGREE), sharding.num_shards)


def test_weights_are_stored_once_and_never_transposed_at_run_time(kraken: Path) -> None:
    proto = DeviceModel.load(kraken / device_file(0)).proto
    stored = {tensor.name for tensor in proto.graph.initializer}
    assert [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    ran = [node for step in cut(proto) if isinstance(step, Stage) for node in step.model.graph.node]
    assert not [node for node in ran if node.op_type == "Transpose" and node.input[0] in stored]
    ends = []
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            start = int(entries["offset"])
            ends.append((entries["location"], start, start + int(entries["length"])))
    ends.sort()
    assert all(one[2] <= other[1] for one, other in pairwise(ends) if one[0] == other[0])


def test_the_run_itself_overlaps(kraken: Path) -> None:
    """Between a start and its wait the run goes through a stage with a product, the first and the last sum apart."""
    ids = token_batch(recognized(NAME).model, 2, 9)

    def act(collectives: Ranks) -> list[Event]:
        model = DeviceModel.load(kraken / device_file(collectives.rank))
        events: list[Event] = []
        DeviceProgram(model, collectives, threads=1).run(
            whole_feeds(model, {"input_ids": ids.numpy()}), trace=events.append
        )
        return events

    for events in together(DEGREE, act):
        assert all(one.ended <= other.began for one, other in pairwise(events))
        starts = [place for place, event in enumerate(events) if event.kind == START]
        waits = [place for place, event in enumerate(events) if event.kind == WAIT]
        products = [
            sum(is_matrix_product(op) or op == "Attention" for event in events[start:wait] for _, op in event.nodes)
            for start, wait in zip(starts, waits)
        ]
        assert all(products[1:-1])
        assert products[0] == products[-1] == 0


def test_one_device_runs_on_plain_onnxruntime(tmp_path: Path) -> None:
    """In standard form, degree 1, without anything of ours."""
    program, _ = lower(recognized(NAME).captured, 1, "standard")
    OnnxBackend().write(program, recognized(NAME).read, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "device-0.onnx"))
    model = recognized(NAME).model
    ids = token_batch(model, 2, 6)
    positions = np.arange(6)[None].repeat(2, 0)
    feeds = {
        "input_ids": ids.numpy(),
        "position_ids": positions,
        "attention_mask": np.ones((2, 6), np.int64),
        "logit_positions": positions,
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    (logits,) = session.run([LOGITS], feeds)
    assert relative_error(torch.from_numpy(logits), logits_of(model, ids)) < 1e-5


def metadata(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / device_file(0)
        proto = onnx.load_model(str(path), load_external_data=False)
        entries = {entry.key: entry.value for entry in proto.metadata_props}
        change(entries)
        del proto.metadata_props[:]
        for key, value in entries.items():
            proto.metadata_props.add(key=key, value=value)
        path.write_bytes(proto.SerializeToString())

    return damage


def model(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / device_file(0)
        proto = onnx.load_model(str(path), load_external_data=False)
        change(proto)
        path.write_bytes(proto.SerializeToString())

    return damage


def set_opset(proto: onnx.ModelProto, version: int) -> None:
    next(entry for entry in proto.opset_import if entry.domain == "").version = version


def set_location(proto: onnx.ModelProto, location: str, weights: int | None = None) -> None:
    """Say of the first so many of a device's own weights, or of all, that they are elsewhere."""
    entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    for entry in [entry for entry in entries if entry.value == lane_file_name(0)][:weights]:
        entry.value = location


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes())) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / device_file(0)).unlink(), "cannot be read"),
        (rewrite(device_file(0), lambda content: content[: len(content) // 2]), "damaged"),
        (rewrite(device_file(0), lambda content: b"nonsense" * 100), "damaged"),
        (lambda directory: (directory / data_file(0)).unlink(), "missing; it holds"),
        (lambda directory: (directory / SHARED_FILE).unlink(), "shared.safetensors: missing; it holds"),
        (rewrite(SHARED_FILE, lambda content: content[:-100]), "truncated"),
        (rewrite(SHARED_FILE, lambda content: content[:500] + b"\x01" + content[501:]), "its hash differs"),
        (rewrite(lane_file_name(0), lambda content: content[:-100]), "truncated"),
        (rewrite(lane_file_name(0), lambda content: content[:9000] + b"\x01" + content[9001:]), "its hash differs"),
        (metadata(lambda entries: entries.update({META_FILES: "{}"})), "incomplete"),
        (metadata(lambda entries: entries.update({META_FILES: "[]"})), "incomplete"),
        (model(lambda proto: set_location(proto, "other", 1)), "is said to be at 'other'"),
        (model(lambda proto: set_location(proto, lane_file_name(1), 1)), "is said to be at 'lane-1.safetensors'"),
        (rewrite(data_file(0), lambda content: content[:-100]), "truncated"),
        (rewrite(data_file(0), lambda content: content[:5000] + b"\x01" + content[5001:]), "its hash differs"),
        (metadata(lambda entries: entries.pop(META_FORMAT)), "not a device file"),
        (metadata(lambda entries: entries.update({META_FORMAT: "9"})), "format '9', this version reads 3"),
        (metadata(lambda entries: entries.pop(META_FILES)), "incomplete"),
        (model(lambda proto: set_opset(proto, OPSET - 1)), f"its opset is {OPSET - 1}"),
        (model(lambda proto: set_opset(proto, 99)), "its opset is 99"),
        (model(lambda proto: set_location(proto, "../../etc/passwd")), "outside its folder"),
        (model(lambda proto: set_location(proto, "/etc/passwd")), "outside its folder"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Path], None], message: str, files: Path) -> None:
    damage(files)
    with pytest.raises(InputFileError, match=message) as caught:
        DeviceModel.load(files / device_file(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: graph.node.pop(0), "used before it is there"),
        (lambda graph: graph.node.remove(next(n for n in graph.node if n.op_type == WAIT)), "never waited for|before"),
        (lambda graph: setattr(next(n for n in graph.node if n.op_type == START), "op_type", "Broadcast"), "refused"),
        (
            lambda graph: setattr(next(n for n in graph.node if is_gemm_proto(n)), "op_type", "Nonsense"),
            "does not take",
        ),
    ],
)
def test_a_model_that_cannot_run_is_refused(
    change: Callable[[onnx.GraphProto], None], message: str, files: Path
) -> None:
    model(lambda proto: change(proto.graph))(files)
    device = DeviceModel.load(files / device_file(0))
    with pytest.raises(InputFileError, match=message) as caught:
        DeviceProgram(device, alone(DEGREE))
    assert "\n" not in str(caught.value)
    assert str(files / device_file(0)) in str(caught.value)


def is_gemm_proto(node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMul"


def test_wrong_use_is_said(kraken: Path) -> None:
    device = DeviceModel.load(kraken / device_file(0))
    with pytest.raises(UsageError, match="one of 2 devices and needs a communicator"):
        DeviceProgram(device)
    with pytest.raises(UsageError, match="is device 0 of 2, this is rank 0 of 3"):
        DeviceProgram(device, alone(3))
    with pytest.raises(UsageError, match=r"has no NoSuchProvider; it has .*CPUExecutionProvider"):
        DeviceProgram(device, alone(DEGREE), provider="NoSuchProvider")
    program = DeviceProgram(device, alone(DEGREE))
    with pytest.raises(UsageError, match="missing: input_ids"):
        program.run({})
    feeds = whole_feeds(device, {"input_ids": np.zeros((1, 4), np.int64)})
    with pytest.raises(UsageError, match="'input_ids' is int32, expected int64"):
        program.run(feeds | {"input_ids": np.zeros((1, 4), np.int32)})
    with pytest.raises(UsageError, match=r"'position_ids' is \[1, 3\], expected"):
        program.run(feeds | {"position_ids": np.zeros((1, 3), np.int64)})
    with pytest.raises(UsageError, match="the model takes at most"):
        ArrayDecoder(program, 1, 10**9)
    decoder = ArrayDecoder(program, 2, 4)
    with pytest.raises(UsageError, match="give the prompt to prefill first"):
        decoder.step(np.zeros(2, np.int64))
    with pytest.raises(UsageError, match="holds 4 tokens and 5 are needed"):
        decoder.prefill(np.zeros((2, 5), np.int64), np.array([5, 5]))


def test_bfloat16_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = lane_program(NAME, DEGREE, "standard").copy()
    program.weights.update(
        {name: spec.__class__(**{**spec.__dict__, "dtype": "bfloat16"}) for name, spec in program.weights.items()}
    )
    with pytest.raises(UsageError, match="--dtype float32"):
        OnnxBackend().write(program, recognized(NAME).read, tmp_path)
    assert not list(tmp_path.iterdir())


def test_products_are_found_in_any_graph() -> None:
    import onnx_ir

    assert is_gemm(onnx_ir.Node("", "MatMul", []))
    assert not is_gemm(onnx_ir.Node("", "Add", []))
