"""The lane graph as a file: torch's format, our reader, no pickles."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._export.serde import serialize

from kraken_compiler._torch_compat import flat_archive
from kraken_compiler.backends.torch_dist import archive_graph
from kraken_compiler.backends.torch_dist.graph_file import load_graph, node_order, save_graph
from kraken_compiler.errors import InputFileError
from kraken_compiler.ir.devices import retarget
from tests.toy_lane_program import toy_program, toy_sources


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "lane.pt2"
    save_graph(toy_program(2), path)
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """Copy the archive, changing entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (entries | (extra or {})).items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)


def edit_graph(path: Path, change: Callable[[Any], None]) -> None:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("model.json"):
            return content
        parsed = json.loads(content)
        change(parsed)
        return json.dumps(parsed).encode()

    rewrite(path, edit)


def test_order_and_numbers_survive(saved: Path) -> None:
    program = toy_program(2)
    loaded = load_graph(saved)
    assert node_order(loaded) == node_order(program.module)
    placeholders = [node.name for node in loaded.graph.nodes if node.op == "placeholder"]
    assert placeholders == [*program.weights, "input_ids"]
    weights = [spec.take(toy_sources()[spec.source], 1) for spec in program.weights.values()]
    for shape in ((3, 9), (1, 1)):
        ids = torch.randint(0, 50, shape)
        torch.testing.assert_close(loaded(*weights, ids), program.module(*weights, ids), rtol=0, atol=0)


def test_torch_reads_the_same(saved: Path) -> None:
    """Our reader and torch's build the same code from one file."""
    assert torch.export.load(saved).graph_module.code == load_graph(saved).code


def test_every_kind_of_argument(tmp_path: Path) -> None:
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
    path = tmp_path / "kinds.pt2"
    graph = torch.fx.Graph()
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(exported.graph, copied))
    for source, target in copied.items():
        target.meta = {"val": source.meta["val"]}
    path.write_bytes(flat_archive(graph))
    loaded = load_graph(path)
    assert node_order(loaded) == node_order(exported.graph_module)
    for operands in (example, (torch.randn(7, 8), torch.tensor([0, 5]))):
        torch.testing.assert_close(tuple(loaded(*operands)), Kinds()(*operands), rtol=0, atol=0)


def test_number_tables_are_torchs() -> None:
    assert {int(code): dtype for code, dtype in serialize._SERIALIZE_TO_TORCH_DTYPE.items()} == archive_graph._DTYPES
    formats = {int(code): value for code, value in serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT.items()}
    assert formats == archive_graph._MEMORY_FORMATS
    assert archive_graph._LAYOUTS[7] is serialize._SERIALIZE_TO_TORCH_LAYOUT[7]  # type: ignore[index]
    assert serialize.SCHEMA_VERSION[0] == archive_graph.SCHEMA_MAJOR
    known = {f"{op.__module__}.{op.__name__}" for op in serialize._SYM_OPS}
    assert known <= archive_graph._SCALAR_OPS.keys()


def test_pickles_are_refused(saved: Path) -> None:
    rewrite(saved, lambda name, content: b"\x80\x02." if "sample_inputs" in name else content)
    with pytest.raises(InputFileError, match=r"refused: 'data/sample_inputs/model\.pt' is not empty"):
        load_graph(saved)


def test_foreign_entries_are_refused(saved: Path) -> None:
    rewrite(saved, lambda name, content: content, {"lane/data/aotinductor/model.so": b"ELF"})
    with pytest.raises(InputFileError, match="unexpected entry"):
        load_graph(saved)


@pytest.mark.parametrize("target", ["torch.load", "torch.hub.load", "os.system", "torch.ops.kraken.nothing.default"])
def test_foreign_calls_are_refused(saved: Path, target: str) -> None:
    edit_graph(saved, lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target=target))
    with pytest.raises(InputFileError, match="refused"):
        load_graph(saved)


def test_another_schema_is_refused(saved: Path) -> None:
    edit_graph(saved, lambda graph: graph["schema_version"].update(major=9))
    with pytest.raises(InputFileError, match=r"graph schema 9.*compile the model again"):
        load_graph(saved)


def test_damage_is_one_clear_line(saved: Path, tmp_path: Path) -> None:
    edit_graph(saved, lambda graph: graph["graph_module"]["graph"].pop("outputs"))
    with pytest.raises(InputFileError, match="damaged graph"):
        load_graph(saved)
    saved.write_bytes(saved.read_bytes()[:200])
    with pytest.raises(InputFileError, match=r"lane\.pt2: damaged"):
        load_graph(saved)
    with pytest.raises(InputFileError, match="No such file"):
        load_graph(tmp_path / "nothing.pt2")


def test_retarget_moves_factories(saved: Path) -> None:
    graph = load_graph(saved)
    assert retarget(graph, "meta")
    assert "device(type='meta')" in graph.code
    assert "device(type='cpu')" not in graph.code
    assert not retarget(graph, torch.device("meta"))
