"""The lane graph as a file: our JSON, the same bytes everywhere, nothing that runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._export.serde import serialize

from kraken_compiler.backends.lane_graph import graph_json
from kraken_compiler.backends.lane_graph.graph_file import load_graph, save_graph
from kraken_compiler.backends.lane_graph.graph_json import graph_from_json, graph_to_json
from kraken_compiler.errors import InputFileError
from kraken_compiler.ops.devices import retarget
from tests.toy_lane_program import toy_program, toy_sources

aten = torch.ops.aten


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "lane.json"
    save_graph(toy_program(2).graph, path)
    return path


def edit_graph(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def calls(graph: fx.Graph) -> list[Any]:
    """Everything in a graph that a file keeps."""
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def test_order_and_numbers_survive(saved: Path) -> None:
    program = toy_program(2)
    loaded = load_graph(saved)
    assert loaded.code == program.module.code
    placeholders = [node.name for node in loaded.graph.nodes if node.op == "placeholder"]
    assert placeholders == [*program.weights, "input_ids"]
    weights = [spec.take(toy_sources()[spec.source], 1) for spec in program.weights.values()]
    for shape in ((3, 9), (1, 1)):
        ids = torch.randint(0, 50, shape)
        torch.testing.assert_close(loaded(*weights, ids), program.module(*weights, ids), rtol=0, atol=0)


@pytest.mark.slow
def test_the_same_graph_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    program = "from tests.toy_lane_program import toy_program; from pathlib import Path; import sys; "
    program += "from kraken_compiler.backends.lane_graph.graph_file import save_graph; "
    program += "save_graph(toy_program(2).graph, Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "again.json")], check=True)
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()
    assert torch.__version__.split("+")[0] not in saved.read_text()


def test_a_captured_graph() -> None:
    class Kinds(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
            length = x.shape[0]
            mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1).to(torch.float32)
            left, right = x.split([3, 5], dim=-1)
            values, _ = x.topk(2, dim=-1)
            mean = torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5)[1]
            taken = x[:, index].to(memory_format=torch.contiguous_format)
            count = torch.arange(length // 2 + length * 2 - 1, dtype=torch.int32).sum()
            return mask, torch.cat([right, left], -1), values, mean, taken, count, x.clamp(min=None, max=0.5), x

    example = (torch.randn(4, 8), torch.tensor([1, 2]))
    exported = torch.export.export(Kinds(), example, dynamic_shapes=({0: torch.export.Dim("n")}, None), strict=False)
    text = graph_to_json(exported.graph)
    graph = graph_from_json(text)
    assert graph_to_json(graph) == text
    loaded = fx.GraphModule({}, graph)
    for operands in (example, (torch.randn(7, 8), torch.tensor([0, 5]))):
        torch.testing.assert_close(tuple(loaded(*operands)), Kinds()(*operands), rtol=0, atol=0)


def test_every_kind_of_argument() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    floats = (0.1, 1e-05, -0.0, 1.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.inf, -math.inf, math.nan)
    others = (None, True, False, 0, -(2**63), "tanh", 'a "quote"', "x", torch.strided, torch.channels_last)
    devices = (torch.device("cpu"), torch.device("cuda", 1), torch.device("meta"))
    arguments = [x, [x, None, [x]], *floats, *others, *devices, *graph_json._CONSTANTS["dtype"].values()]
    for argument in arguments:
        x = graph.call_function(aten.full.default, (x, argument), {"pin_memory": argument})
    graph.call_function(graph_json._FUNCTIONS["operator.getitem"], (x, 1))
    graph.output((x, None))
    text = graph_to_json(graph)
    assert json.loads(text)["nodes"][0]["kwargs"] == {"pin_memory": "x"}
    read = graph_from_json(text)
    assert calls(read) == calls(graph)
    kinds = [[type(value) for value in node.args] for node in read.nodes if node.op == "call_function"]
    assert kinds[2:] == [[type(value) for value in node.args] for node in list(graph.nodes)[3:-1]]


def test_what_is_no_argument_of_a_lane_program_is_our_bug() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(aten.full.default, (object(),)),))
    with pytest.raises(AssertionError, match="no lane program has an argument like"):
        graph_to_json(graph)


def test_all_arithmetic_of_sizes_that_torch_exports_is_known() -> None:
    known = {f"{op.__module__}.{op.__name__}" for op in serialize._SYM_OPS}
    assert {name.replace("_operator.", "operator.") for name in known} <= graph_json._FUNCTIONS.keys()
    dtypes = {str(dtype).removeprefix("torch.") for dtype in serialize._SERIALIZE_TO_TORCH_DTYPE.values()}
    assert dtypes <= graph_json._CONSTANTS["dtype"].keys()


@pytest.mark.parametrize("target", ["torch.load", "operator.attrgetter", "os.system", "kraken.nothing.default"])
def test_foreign_calls_are_refused(saved: Path, target: str) -> None:
    edit_graph(saved, lambda graph: graph["nodes"][0].update(call=target))
    with pytest.raises(InputFileError, match="refused"):
        load_graph(saved)


def test_another_schema_is_refused(saved: Path) -> None:
    edit_graph(saved, lambda graph: graph.update(kraken_graph=9))
    with pytest.raises(InputFileError, match=r"graph schema 9.*compile the model again"):
        load_graph(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: graph.update(weights=[]), "unknown member 'weights'"),
        (lambda graph: graph["nodes"][0].update(meta={}), "unknown member 'meta'"),
        (lambda graph: graph["nodes"][1].update(name=graph["nodes"][0]["name"]), "is the name of something else"),
        (lambda graph: graph["nodes"][0].update(name="print"), "'print' is the name of something else"),
        (lambda graph: graph["nodes"][0].update(args=[{"dtype": "device"}]), "an argument of kind 'dtype'"),
        (lambda graph: graph["nodes"][0].update(args=[{"device": "cpu\n"}]), "an argument of kind 'device'"),
        (lambda graph: graph["nodes"][0].update(args=[{"object": "os"}]), "an argument of kind 'object'"),
        (lambda graph: graph["nodes"][0].update(args=[{"str": 1}]), "an argument of kind 'str' that is no text"),
        (lambda graph: graph["nodes"][0].update(args=[math.nan]), "NaN is no number of JSON"),
        (lambda graph: graph["nodes"][0].update(args=["none_such"]), "damaged graph"),
    ],
)
def test_what_is_not_understood_is_refused(saved: Path, change: Callable[[Any], object], message: str) -> None:
    edit_graph(saved, change)
    with pytest.raises(InputFileError, match=message):
        load_graph(saved)


def test_damage_is_one_clear_line(saved: Path, tmp_path: Path) -> None:
    edit_graph(saved, lambda graph: graph.pop("output"))
    with pytest.raises(InputFileError, match="damaged graph"):
        load_graph(saved)
    saved.write_bytes(saved.read_bytes()[:200])
    with pytest.raises(InputFileError, match=r"lane\.json: damaged"):
        load_graph(saved)
    with pytest.raises(InputFileError, match="No such file"):
        load_graph(tmp_path / "nothing.json")


def test_retarget_moves_factories(saved: Path) -> None:
    graph = load_graph(saved)
    assert retarget(graph, "meta")
    assert "device(type='meta')" in graph.code
    assert "device(type='cpu')" not in graph.code
    assert not retarget(graph, torch.device("meta"))
