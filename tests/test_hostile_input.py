"""Files that somebody damaged or made to do harm are refused in one line: nothing runs, nothing outside is read."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.lane_graph.graph_file import load_graph
from kraken_compiler.backends.lane_graph.lane_files import map_weights
from kraken_compiler.backends.onnx_ort import format as device_format
from kraken_compiler.backends.onnx_ort.run.cut_model import cut
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.capture.archive_safety import inspect_archive
from kraken_compiler.errors import InputFileError
from kraken_compiler.lanes.calling import bind, unflatten_output
from kraken_compiler.weights.checkpoint import SafetensorsCheckpoint
from kraken_compiler.weights.checkpoint_files import weight_files
from kraken_compiler.weights.io.safetensors_format import read_header
from tests.hostile_files import CANARY, dumped, mutated, mutated_bytes, refused_or_read, rezipped
from tests.toy_lane_program import edit_manifest, toy_program, toy_sources, write_toy

GRAPH = "models/model.json"


def cases(number: int) -> Callable[[Callable[..., None]], Any]:
    """So many examples, the same ones in every run; together they take a while."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    chosen = settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
    return lambda test: pytest.mark.slow(chosen(test))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("valid") / "toy.kraken", 2)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "toy.kraken"))


@pytest.fixture(autouse=True)
def _in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def use(directory: Path) -> None:
    """What a caller does with a manifest: its weights' shapes and parts, and its call."""
    manifest = open_artifact(directory, verify=False).manifest
    sources = toy_sources()
    for spec in manifest.weights:
        source = sources.get(spec.source)
        if source is not None and tuple(source.shape) == spec.source_shape:
            assert tuple(spec.take(source, 0).shape) == spec.shape
        assert spec.nbytes >= 0


@cases(500)
@given(data=st.data())
def test_manifests(artifact: Path, copy: Path, data: st.DataObject) -> None:
    valid = json.loads((artifact / "manifest.json").read_text())
    (copy / "manifest.json").write_bytes(dumped(data.draw(mutated(valid))))
    refused_or_read(lambda: use(copy), copy)


@cases(200)
@given(data=st.data())
def test_bytes_of_manifests(artifact: Path, copy: Path, data: st.DataObject) -> None:
    valid = (artifact / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(data.draw(mutated_bytes(valid)))
    refused_or_read(lambda: use(copy), copy)


OWN_WEIGHTS = {name: spec for name, spec in toy_program(2).weights.items() if not spec.shared}


def read_weights(path: Path) -> None:
    checkpoint = SafetensorsCheckpoint.open((path,))
    for name in checkpoint.names():
        dtype, shape = checkpoint.describe(name)
        assert checkpoint.read(name).shape == shape
        assert dtype is not None


@cases(300)
@given(data=st.data())
def test_safetensors_headers(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    valid = (artifact / "lanes" / "lane-0.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", valid[:8])
    header = dumped(data.draw(mutated(json.loads(valid[8 : 8 + length]))))
    path = tmp_path / "lane-0.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + valid[8 + length :])
    refused_or_read(lambda: read_weights(path), tmp_path)
    refused_or_read(lambda: map_weights(path, OWN_WEIGHTS), tmp_path)


@cases(200)
@given(data=st.data())
def test_bytes_of_safetensors(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "lane-0.safetensors"
    path.write_bytes(data.draw(mutated_bytes((artifact / "lanes" / "lane-0.safetensors").read_bytes())))
    refused_or_read(lambda: read_weights(path), tmp_path)
    refused_or_read(lambda: map_weights(path, OWN_WEIGHTS), tmp_path)


def inspect(path: Path) -> None:
    """What is looked at before torch opens a source archive."""
    with path.open("rb") as file:
        inspect_archive(file, path, trust_pickle=False)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive, as torch.export saves one."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    dims = ({0: torch.export.Dim("batch")},)
    path = tmp_path_factory.mktemp("source") / "model.pt2"
    torch.export.save(torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes=dims), path)
    return path


@cases(300)
@given(data=st.data())
def test_graphs(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    valid = json.loads((artifact / "lanes" / "lane.json").read_text())
    path = tmp_path / "lane.json"
    path.write_bytes(dumped(data.draw(mutated(valid))))
    refused_or_read(lambda: load_graph(path), tmp_path)


@cases(200)
@given(data=st.data())
def test_bytes_of_graphs(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "lane.json"
    path.write_bytes(data.draw(mutated_bytes((artifact / "lanes" / "lane.json").read_bytes())))
    refused_or_read(lambda: load_graph(path), tmp_path)


@cases(300)
@given(data=st.data())
def test_graphs_of_archives(archive: Path, tmp_path: Path, data: st.DataObject) -> None:
    valid = archive.read_bytes()
    path = tmp_path / "model.pt2"
    path.write_bytes(rezipped(valid, {GRAPH: dumped(data.draw(mutated(graph_of(valid))))}))
    refused_or_read(lambda: inspect(path), tmp_path)


@cases(200)
@given(data=st.data())
def test_bytes_of_archives(archive: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(data.draw(mutated_bytes(archive.read_bytes())))
    refused_or_read(lambda: inspect(path), tmp_path)


def graph_of(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GRAPH))
        return json.loads(archive.read(name))


def device_proto() -> onnx.ModelProto:
    """A device file as small as can be: a product with its weight in the data file, and its sum over the devices."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("length", "64"), ("location", "device-0.onnx.data")):
        weight.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["part"], name="product"),
        helper.make_node(device_format.START, ["part"], ["handle"], name="start", domain=device_format.DOMAIN),
        helper.make_node(device_format.WAIT, ["handle"], ["sum"], name="wait", domain=device_format.DOMAIN),
        helper.make_node("Relu", ["sum"], ["logits"], name="relu"),
    ]
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
        for name in ("x", "part", "handle", "sum", "logits")
    }
    graph = helper.make_graph(
        nodes, "device", [values["x"]], [values["logits"]], [weight], value_info=list(values.values())[1:4]
    )
    opsets = [helper.make_opsetid("", device_format.OPSET), helper.make_opsetid(device_format.DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=opsets)
    cache = {"heads": 2, "key_dim": 4, "value_dim": 4, "dtype": "float32"}
    metadata = {
        device_format.META_FORMAT: str(device_format.FORMAT_VERSION),
        device_format.META_LANE: "0",
        device_format.META_DEGREE: "2",
        device_format.META_FORMS: json.dumps(["kraken"]),
        device_format.META_PROGRAM: "0" * 64,
        device_format.META_FILES: json.dumps({"device-0.onnx.data": "0" * 64}),
        device_format.META_CACHE: json.dumps([cache]),
        device_format.META_POSITIONS: "16",
    }
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto


def read_device(path: Path) -> None:
    model = DeviceModel.load(path, verify=False)
    cut(model.proto)


def write_device(directory: Path, content: bytes) -> Path:
    (directory / "device-0.onnx.data").write_bytes(bytes(64))
    path = directory / "device-0.onnx"
    path.write_bytes(content)
    return path


@cases(300)
@given(data=st.data())
def test_bytes_of_device_files(tmp_path: Path, data: st.DataObject) -> None:
    path = write_device(tmp_path, data.draw(mutated_bytes(device_proto().SerializeToString())))
    refused_or_read(lambda: read_device(path), tmp_path)


@cases(300)
@given(data=st.data())
def test_device_files(tmp_path: Path, data: st.DataObject) -> None:
    """What a device file says of itself, where its weights are, and what its nodes read."""
    proto = device_proto()
    nodes, weight = proto.graph.node, proto.graph.initializer[0]
    records = [
        *((entry, "value") for entry in proto.metadata_props),
        *((entry, "value") for entry in weight.external_data),
        *((node, field) for node in nodes for field in ("name", "op_type", "domain")),
        (weight, "name"),
    ]
    for record, field in data.draw(st.lists(st.sampled_from(records), min_size=1, max_size=2)):
        old = getattr(record, field)
        texts = st.one_of(
            st.text(max_size=10), st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "-1", "null", "9" * 400])
        )
        if old.startswith(("[", "{")):
            texts = st.one_of(texts, mutated(json.loads(old)).map(json.dumps))
        text = data.draw(texts)
        setattr(record, field, text.encode("utf-8", "replace").decode())
    node = nodes[data.draw(st.integers(0, len(nodes) - 1))]
    if data.draw(st.booleans()):
        del node.input[:]
    if data.draw(st.booleans()):
        node.output.append("more")
    path = write_device(tmp_path, proto.SerializeToString())
    refused_or_read(lambda: read_device(path), tmp_path)


def test_the_valid_files_are_read(artifact: Path, archive: Path, tmp_path: Path) -> None:
    assert refused_or_read(lambda: use(artifact), artifact) is None
    assert refused_or_read(lambda: load_graph(artifact / "lanes" / "lane.json"), artifact) is None
    assert refused_or_read(lambda: inspect(archive), archive.parent) is None
    weights = artifact / "lanes" / "lane-0.safetensors"
    assert refused_or_read(lambda: read_weights(weights), artifact) is None
    assert refused_or_read(lambda: map_weights(weights, OWN_WEIGHTS), artifact) is None
    assert (
        refused_or_read(lambda: read_device(write_device(tmp_path, device_proto().SerializeToString())), tmp_path)
        is None
    )


@pytest.mark.parametrize("kind", ["link", "link to the same", "linked folder", "pipe", "directory"])
def test_what_is_no_file_of_the_artifact_is_refused(copy: Path, tmp_path: Path, kind: str) -> None:
    path = copy / "lanes" / "lane-0.safetensors"
    outside = tmp_path / "outside"
    if kind == "linked folder":
        (copy / "lanes").rename(outside)
        (copy / "lanes").symlink_to(outside)
    else:
        path.rename(outside)
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "link to the same":
        outside.rename(copy / "other")
        path.symlink_to(copy / "other")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    message = refused_or_read(lambda: open_artifact(copy, verify=False), copy)
    assert message is not None
    assert "refused" in message


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_manifest_that_is_no_file_is_refused(copy: Path, tmp_path: Path, kind: str) -> None:
    path = copy / "manifest.json"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside") if kind == "link" else os.mkfifo(path)
    with pytest.raises(InputFileError, match="refused"):
        open_artifact(copy)


@pytest.mark.parametrize("place", ["placeholder", "keyword", "result"])
def test_names_in_a_graph_are_not_run_as_python(artifact: Path, tmp_path: Path, place: str) -> None:
    text = f"x=__import__('pathlib').Path('{CANARY}').touch()"
    graph = json.loads((artifact / "lanes" / "lane.json").read_text())
    path = tmp_path / "lane.json"
    if place == "keyword":
        graph["nodes"][0]["kwargs"] = {text: 1}
        path.write_bytes(dumped(graph))
    else:
        old = graph["inputs"][-1] if place == "placeholder" else graph["nodes"][0]["name"]
        # Everywhere, so that the graph is whole and nothing but its name is wrong with the value.
        path.write_bytes(dumped(graph).replace(json.dumps(old).encode(), json.dumps(text).encode()))
    message = refused_or_read(lambda: load_graph(path), tmp_path)
    assert message is not None
    assert "no name of a value" in message


def test_a_graph_cannot_open_files(artifact: Path, tmp_path: Path) -> None:
    graph = json.loads((artifact / "lanes" / "lane.json").read_text())
    graph["nodes"][0]["call"] = "aten.from_file.default"
    path = tmp_path / "lane.json"
    path.write_bytes(dumped(graph))
    with pytest.raises(InputFileError, match=r"refused: it calls 'aten\.from_file\.default'"):
        load_graph(path)


def test_a_graph_too_large_to_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lane.json"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(InputFileError, match="no graph is that large"):
        load_graph(path)


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, '{"kraken_graph": 1, "inputs": ' + "[" * 100_000])
def test_a_graph_nested_too_deeply_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lane.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match="damaged graph"):
        load_graph(path)


def test_structures_in_a_manifest_import_nothing_of_the_file(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "harmful.py").write_text(f"open({CANARY!r}, 'w')")
    context = json.dumps({"default_factory_module": "harmful", "default_factory_name": "list", "dict_context": []})
    tree = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": []}])
    call = json.loads((copy / "manifest.json").read_text())["call"]
    edit_manifest(copy, call=call | {"out_tree": tree})

    def run() -> None:
        manifest = open_artifact(copy, verify=False).manifest
        bind(manifest.call, manifest.inputs, (), {})
        unflatten_output(manifest.call, ())

    message = refused_or_read(run, tmp_path)
    assert message is not None
    assert "imports the module 'harmful'" in message


@pytest.mark.parametrize("place", ["constant", "branch", "function"])
def test_constants_of_a_device_file_lie_in_no_other_file(tmp_path: Path, place: str) -> None:
    proto = device_proto()
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    if place == "branch":
        branch = helper.make_graph([], "branch", [], [], [tensor])
        node = helper.make_node("If", ["x"], ["c"], then_branch=branch, else_branch=branch)
    if place == "function":
        opsets = [helper.make_opsetid("", device_format.OPSET)]
        proto.functions.append(helper.make_function("own", "f", [], ["c"], [node], opsets))
    else:
        proto.graph.node.append(node)
    path = write_device(tmp_path, proto.SerializeToString())
    with pytest.raises(InputFileError, match="refused: a constant of it lies in another file"):
        DeviceModel.load(path, verify=False)


def test_an_index_of_weight_files_names_only_files_of_the_directory(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(b"")
    listing = {"weight_map": {"a": "../outside.safetensors", "b": "/etc/passwd"}}
    (model / "index.json").write_text(json.dumps(listing))
    with pytest.raises(InputFileError, match="which is outside of the directory"):
        weight_files(model, model / "index.json")


def test_a_header_nested_beyond_measure(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = b"[" * 200_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputFileError, match="its header is not JSON"):
        read_header(path)
