"""Quantized weights of ONNX devices: what is stored, that devices compute with it, and that its cost is said."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend, OnnxOptions
from kraken_compiler.backends.onnx_ort.check.quantized_lanes import read_as_quantized
from kraken_compiler.backends.onnx_ort.format import (
    LOGITS,
    META_WEIGHTS,
    MICROSOFT_DOMAIN,
    QUANTIZED_PRODUCT,
    WEIGHT_KINDS,
    data_file,
    device_file,
)
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.backends.onnx_ort.write.quantization import QUANTIZATIONS, Quantization, dequantize, quantize
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.weights.lane_file_names import SHARED_FILE, lane_file_name
from tests.test_families import lane_program, recognized, relative_error
from tests.zoo import token_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

DEGREE = 2
EVERY_KIND = pytest.mark.parametrize("kind", WEIGHT_KINDS)


# numbers -------------------------------------------------------------------------------------------------------------


def of_onnxruntime(parts: tuple[Tensor, Tensor, Tensor], rows: int, how: Quantization) -> Tensor:
    """The weight as ONNX Runtime's own kernel sees it: its product with the identity."""
    columns = parts[1].shape[0]
    kind = onnx.helper.np_dtype_to_tensor_dtype(parts[1].numpy().dtype)
    node = onnx.helper.make_node(
        QUANTIZED_PRODUCT,
        ["x", "integers", "scales", "zero_points"],
        ["y"],
        domain=MICROSOFT_DOMAIN,
        K=rows,
        N=columns,
        bits=how.bits,
        block_size=how.block,
    )
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", kind, [rows, rows])],
        [onnx.helper.make_tensor_value_info("y", kind, [rows, columns])],
        [onnx.numpy_helper.from_array(part.numpy(), name) for part, name in zip(parts, node.input[1:], strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.eye(rows, dtype=parts[1].numpy().dtype)})
    return torch.from_numpy(y)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [256, 100, 1])
def test_weights_are_rounded_to_the_nearest(kind: str, dtype: torch.dtype, rows: int) -> None:
    """With rows that fill their blocks, and with rows that do not; and ONNX Runtime reads what we read."""
    how, columns = QUANTIZATIONS[kind], 24
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    parts = quantize(weight, how)
    assert tuple(tuple(part.shape) for part in parts) == how.part_shapes(rows, columns)
    assert [part.dtype for part in parts] == [torch.uint8, dtype, torch.uint8]
    have = dequantize(parts, rows, how)
    assert (have.shape, have.dtype) == (weight.shape, dtype)
    steps = parts[1].float().repeat_interleave(how.block, 1)[:, :rows].t()
    # A zero point is rounded too, so what lies at the end of a block may be off by a whole step.
    assert ((have.float() - weight.float()).abs() <= 1.01 * steps + 1e-6).all()
    torch.testing.assert_close(
        have, of_onnxruntime(parts, rows, how), rtol=0, atol=1e-6 if dtype.itemsize == 4 else 4e-3
    )


def test_the_quantizer_turns_no_logging_on() -> None:
    """ONNX Runtime's module does when it is imported, for the whole process."""
    before = list(logging.getLogger().handlers), logging.getLogger().level
    quantize(torch.ones(4, 4), QUANTIZATIONS["int4"])
    assert (logging.getLogger().handlers, logging.getLogger().level) == before


# device files --------------------------------------------------------------------------------------------------------


def write(
    name: str, kind: str | None, directory: Path, *, degree: int = DEGREE, form: str = "kraken"
) -> list[DeviceModel]:
    found = recognized(name)
    program = lane_program(name, degree, form) if degree > 1 else lower(found.captured, degree, form)[0]
    directory.mkdir()
    OnnxBackend(OnnxOptions(onnx_weights=kind)).write(program, found.read, directory)
    return [DeviceModel.load(directory / device_file(lane)) for lane in range(degree)]


def logits_of_devices(models: list[DeviceModel], ids: Tensor) -> Tensor:
    def act(collectives: Ranks) -> Tensor:
        model = models[collectives.rank]
        feeds = whole_feeds(model, {"input_ids": ids.numpy()})
        return torch.from_numpy(DeviceProgram(model, collectives, threads=1).run(feeds)[LOGITS].copy())

    first, *rest = together(len(models), act)
    assert all(torch.equal(first, other) for other in rest)
    return first


# Linear layers, GPT-2's weights that lie the other way round and Gemm, and sizes that fill no block.
@EVERY_KIND
@pytest.mark.parametrize("name", ["llama", "gpt2", "plain_alibi"])
def test_devices_compute_with_the_quantized_weights(name: str, kind: str, tmp_path: Path) -> None:
    models = write(name, kind, tmp_path / "files")
    ids = token_batch(recognized(name).model, 2, 9)
    program, read = (
        lane_program(name, DEGREE, "kraken"),
        read_from_source(lane_program(name, DEGREE, "kraken"), recognized(name).read),
    )
    whole = StreamingProgram(program, read).run_flat([ids])[0]
    quantized = StreamingProgram(program, read_as_quantized(models[0], read)).run_flat([ids])[0]
    cost = relative_error(quantized, whole)
    exact = logits_of_devices([model.with_exact_products() for model in models], ids)
    assert relative_error(exact, quantized) < 1e-5
    # These tiny models are much more sensitive than trained ones: what matters is that the comparison would notice.
    assert 1e-3 < cost < 1
    assert 1e-4 < relative_error(logits_of_devices(models, ids), quantized) < 0.1


@EVERY_KIND
def test_what_is_stored(kind: str, tmp_path: Path) -> None:
    models, plain = write("llama", kind, tmp_path / "files"), write("llama", None, tmp_path / "plain")
    onnx.checker.check_model(str(tmp_path / "files" / device_file(1)))
    assert [model.weights for model in (*models, *plain)] == [kind, kind, None, None]
    assert models[0].program == models[1].program != plain[0].program
    proto = models[0].proto
    counted = {
        op: sum(node.op_type == op for node in model.proto.graph.node)
        for model, op in ((plain[0], "MatMul"), (models[0], QUANTIZED_PRODUCT))
    }
    assert counted["MatMul"] == counted[QUANTIZED_PRODUCT] > 0
    assert "MatMul" not in {node.op_type for node in proto.graph.node}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    # Embeddings are looked up, and stay.
    assert any(
        node.op_type == "Gather" and stored[node.input[0]].data_type == onnx.TensorProto.FLOAT
        for node in proto.graph.node
        if node.input[0] in stored
    )
    sizes = [
        sum((tmp_path / directory / file).stat().st_size for file in (data_file(0), lane_file_name(0)))
        for directory in ("files", "plain")
    ]
    assert sizes[0] < sizes[1]
    whole = {
        (spec.tensor_name, dim.axis): dim.simple_sharding[0].dim_value
        for node in proto.graph.node
        for one in node.device_configurations
        for spec in one.sharding_spec
        for dim in spec.sharded_dim
    }
    quantized = {
        name: size
        for (name, axis), size in whole.items()
        if name.endswith(f"_Q{QUANTIZATIONS[kind].bits}") and axis == 0
    }
    bits = [
        attribute.i
        for node in proto.graph.node
        if node.op_type == QUANTIZED_PRODUCT
        for attribute in node.attribute
        if attribute.name == "bits"
    ]
    # The head has 8 in any case.
    assert bits == [QUANTIZATIONS[kind].bits] * (len(bits) - 1) + [8]
    assert quantized
    assert all(-(-size // DEGREE) == stored[name].dims[0] for name, size in quantized.items())


@pytest.mark.parametrize("degree", [1, 2])
def test_a_head_that_is_the_embedding_too_is_looked_up_in_its_integers(degree: int, tmp_path: Path) -> None:
    """GPT-2 looks tokens up in the tensor that its head multiplies by, in 8 bits as always."""
    models = write("gpt2", "int4", tmp_path / "files", degree=degree, form="standard")
    graph = models[0].proto.graph
    assert "MatMul" not in {node.op_type for node in graph.node}
    stored = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    head = next(node for node in reversed(graph.node) if node.op_type == QUANTIZED_PRODUCT)
    looked_up = [node.input[0] for node in graph.node if node.op_type == "Gather"]
    assert {*head.input[1:4]} <= {*looked_up}
    assert [-(-97 // degree), 64] not in stored.values()
    found = recognized("gpt2")
    program = lane_program("gpt2", degree, "standard") if degree > 1 else lower(found.captured, 1, "standard")[0]
    ids = token_batch(found.model, 2, 9)
    lanes = StreamingProgram(program, read_as_quantized(models[0], read_from_source(program, found.read)))
    exact = logits_of_devices([model.with_exact_products() for model in models], ids)
    assert relative_error(exact, lanes.run_flat([ids])[0]) < 1e-5


def test_other_weights_than_are_known_are_refused(tmp_path: Path) -> None:
    write("plain_gpt", "int4", tmp_path / "files")
    path = tmp_path / "files" / device_file(0)
    proto = onnx.load_model(str(path), load_external_data=False)
    next(entry for entry in proto.metadata_props if entry.key == META_WEIGHTS).value = "int3"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputFileError, match="its weights are 'int3'; this version knows int8 and int4"):
        DeviceModel.load(path)


# the whole way -------------------------------------------------------------------------------------------------------


def test_compiled_verified_and_mixed_up(tmp_path: Path) -> None:
    name, out = "plain_gpt", tmp_path / "out"
    model = recognized(name).model
    example = {"input_ids": token_batch(model, 2, 16)}
    result = compile_model(model, out, degree=DEGREE, backends=("onnx",), onnx_weights="int4", example_inputs=example)
    found = result.verification
    assert found is not None
    assert sum("ONNX devices" in comparison.what for comparison in found.comparisons) == 6
    assert all(comparison.passed for comparison in found.comparisons)
    assert found.quality is not None
    assert found.rounded["int4"].kl != found.quality.kl
    assert any(line.startswith("int4      on ") for line in found.lines())
    again = verify_artifact(out, source=model, example_inputs=example)
    assert again.rounded == found.rounded
    artifact = open_artifact(out)
    # A device of another compile, whose weights are quantized otherwise, is no device of this one.
    write(name, "int8", tmp_path / "other")
    for file in (device_file(1), data_file(1), lane_file_name(1), SHARED_FILE):
        shutil.copy(tmp_path / "other" / file, out / "lanes" / file)
    with pytest.raises(InputFileError, match="is not device 1 of 2 of this compile"):
        OnnxBackend().schedule(replace(artifact, directory=out))


def test_with_collectives_that_cannot_run_here(tmp_path: Path) -> None:
    model = recognized("plain_gpt").model
    result = compile_model(
        model,
        tmp_path / "out",
        degree=DEGREE,
        backends=("onnx",),
        collectives="ort-nccl",
        onnx_weights="int8",
        example_inputs={"input_ids": token_batch(model, 2, 16)},
    )
    assert result.verification is not None
    assert result.verification.rounded == {}
    assert any("no quality measurement of the int8 weights" in reason for reason in result.verification.skipped)
    device = DeviceModel.load(tmp_path / "out" / "lanes" / device_file(0))
    assert {node.op_type for node in device.proto.graph.node if node.domain} == {
        "AllReduce",
        "AllGather",
        QUANTIZED_PRODUCT,
    }


def test_wrong_options(tmp_path: Path) -> None:
    model = recognized("plain_gpt").model
    with pytest.raises(UsageError, match="--onnx-weights int2: choose from int8, int4"):
        compile_model(model, tmp_path / "out", backends=("onnx",), onnx_weights="int2")
    with pytest.raises(UsageError, match="--onnx-weights int4 is an option of the onnx backend; add --backend onnx"):
        compile_model(model, tmp_path / "out", onnx_weights="int4")
