"""Models in half precision: casts inside norms and attention survive the rewrite, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kraken_compiler
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend, OnnxOptions
from kraken_compiler.backends.onnx_ort.check.quantized_lanes import read_as_quantized
from kraken_compiler.backends.onnx_ort.format import LOGITS, device_file
from kraken_compiler.backends.onnx_ort.run.device_model import DeviceModel
from kraken_compiler.backends.onnx_ort.run.device_program import DeviceProgram
from kraken_compiler.backends.onnx_ort.run.feeds import whole_feeds
from kraken_compiler.capture import capture
from kraken_compiler.lanes.reference import StreamingProgram, read_from_source
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.thread_ranks import together
from kraken_compiler.ranks.session import Ranks
from kraken_compiler.verify.compare import errors
from kraken_compiler.verify.tolerances import rank_tolerance
from tests.zoo import SUPPORTED, logits_of, token_batch

pytestmark = pytest.mark.slow


# Eager attention in float32, fused and decomposed norms, ALiBi, and plain code: one of each kind keeps this fast.
KINDS = ("llama", "gemma3", "gpt_neo", "gptj", "bloom", "cohere", "falcon_alibi", "plain_in_place")


@pytest.mark.parametrize("name", KINDS)
def test_standard_form_equals_the_source_in_bfloat16(name):
    model = SUPPORTED[name]().to(torch.bfloat16)
    ids = token_batch(model, 2, 16)
    lanes = kraken_compiler.transform(model, 2, "standard", example_inputs={"input_ids": ids})
    given = token_batch(model, 3, 9, seed=1)
    have, want = logits_of(lanes, given), logits_of(model, given)
    assert have.dtype == want.dtype
    error = (have.float() - want.float()).norm() / want.float().norm()
    assert error < 3e-2, f"{name}: relative error {error:.1e}"


# Rotary and learned positions, and the family with the largest error of those that were measured.
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_onnx_devices_in_float16(name: str, weights: str | None, tmp_path: Path) -> None:
    model = SUPPORTED[name]().to(torch.float16)
    captured = capture(model, example_inputs={"input_ids": token_batch(model, 2, 16)})
    program, _ = lower(captured.program, 2, "kraken")
    OnnxBackend(OnnxOptions(onnx_weights=weights)).write(program, captured.store.read, tmp_path)
    models = [DeviceModel.load(tmp_path / device_file(lane)).with_exact_products() for lane in range(2)]
    given = token_batch(model, 3, 12, seed=1)
    read = read_as_quantized(models[0], read_from_source(program, captured.store.read))
    want = StreamingProgram(program, read).run_flat([given])[0]

    def act(collectives: Ranks) -> torch.Tensor:
        device = models[collectives.rank]
        feeds = whole_feeds(device, {"input_ids": given.numpy()})
        return torch.from_numpy(DeviceProgram(device, collectives, threads=1).run(feeds)[LOGITS].copy())

    for have in together(2, act):
        assert have.dtype == torch.float16
        assert errors(have, want)[1] < rank_tolerance([torch.float16], 0.0)
