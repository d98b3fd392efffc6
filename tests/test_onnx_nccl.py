"""Device files with the collectives of ONNX Runtime builds with NCCL: written and checked, never run."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from kraken_compiler.backends.onnx_ort.format import DOMAIN, NCCL_DOMAIN, device_file
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import UsageError
from kraken_compiler.quality.thread_ranks import alone
from tests.test_families import recognized
from tests.zoo import token_batch

pytestmark = pytest.mark.slow


def test_compiled_for_nccl(tmp_path: Path) -> None:
    model = recognized("plain_gpt").model
    example = {"input_ids": token_batch(model, 2, 16)}
    result = compile_model(
        model, tmp_path / "out", degree=2, backends=("onnx",), collectives="ort-nccl", example_inputs=example
    )
    assert any("checked against schemas, not run" in note for note in result.notes)
    path = tmp_path / "out" / "lanes" / device_file(1)
    onnx.checker.check_model(str(path))
    device = DeviceModel.load(path)
    used = [node for node in device.proto.graph.node if node.domain]
    assert {node.domain for node in used} == {NCCL_DOMAIN}
    layers = len(result.report.to_dict()["layers"])
    assert [node.op_type for node in used] == ["AllReduce"] * (1 + layers) + ["AllGather"], "the first of the embedding"
    assert DOMAIN not in {entry.domain for entry in device.proto.opset_import}
    (gather,) = (node for node in used if node.op_type == "AllGather")
    assert {attribute.name: attribute.i for attribute in gather.attribute} == {"axis": 2, "group_size": 2}
    # A later check does not try to run them either, and checks the rest.
    found = verify_artifact(tmp_path / "out", source=model, example_inputs=example)
    assert [comparison.what for comparison in found.comparisons] == ["standard form against the source"] * 4
    with pytest.raises(UsageError, match="--collectives ort-nccl"):
        DeviceProgram(device, alone(2))


def test_an_unknown_kind_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--collectives mpi: choose from kraken, ort-nccl"):
        compile_model(recognized("plain_gpt").model, tmp_path / "out", backends=("onnx",), collectives="mpi")
