"""Kraken models of the paper: the model against the paper's equations, and what is compiled of it against the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kraken_compiler
from kraken_compiler.capture import capture
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.heal import heal_artifact
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import InputFileError, UnsupportedModelError, UsageError
from kraken_compiler.native import PRESETS, KrakenConfig, KrakenLM
from kraken_compiler.native.directory import CONFIG_FILE, WEIGHTS_FILE, load_native, save_native
from kraken_compiler.passes.form.join_streams import ANY_LANE, lane_source
from kraken_compiler.passes.lower import lower_native
from kraken_compiler.quality.healing.settings import HealSettings

GPT = KrakenConfig(layers=3, width=48, heads=4, degree=3, vocabulary=100, context=64)
LLAMA = replace(
    GPT, degree=2, heads=4, kv_heads=2, norm="rms", ffn="swiglu", positions="rotary", expansion=2.5, layers=4
)
CONFIGS = {
    "one lane": replace(GPT, degree=1),
    "gpt": GPT,
    "llama": LLAMA,
    "one layer": replace(GPT, layers=1),
    "four lanes": replace(LLAMA, degree=4),
}


def model_of(config: KrakenConfig) -> KrakenLM:
    """A model whose weights are far from where training begins."""
    torch.manual_seed(0)
    model = KrakenLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def by_the_paper(model: KrakenLM, ids: Tensor) -> Tensor:
    """The equations of the paper as they stand, lane by lane, the peers' streams added one by one."""
    x, rotation, degree = model.embedded(ids), model.rotation(ids), model.config.degree
    streams = [x] * degree
    for number in range(model.config.layers):
        layers = [model.lane(lane).layer(number) for lane in range(degree)]
        following = []
        for lane, layer in enumerate(layers):
            m = layer.attend(streams[lane], rotation)
            a = streams[lane] + m
            peers = sum((streams[other] for other in range(degree) if other != lane), torch.zeros_like(a))
            u = a if number == 0 else a + peers
            following.append(a + layer.think(u))
        streams = following
    whole = torch.cat([model.lane(lane).join.weight for lane in range(degree)], 1)
    return model.logits(torch.cat(streams, -1) @ whole.T)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_the_papers(name: str) -> None:
    model = model_of(CONFIGS[name])
    ids = torch.randint(100, (2, 19))
    torch.testing.assert_close(model(ids), by_the_paper(model, ids), rtol=1e-4, atol=1e-4)
    assert model.loss(ids).item() == pytest.approx(
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-5
    )


def test_parameters_follow_from_the_sizes() -> None:
    for config in CONFIGS.values():
        assert config.parameters == sum(one.numel() for one in KrakenLM(config).parameters())
    # Matrices alone, without W_concat, as the paper's sizes are counted: millions by the design's own arithmetic.
    matrices = {
        name: one.vocabulary * one.width + one.degree * one.layers * (4 + 2 * one.expansion) * one.width**2
        for name, one in PRESETS.items()
    }
    assert [round(matrices[f"kraken-125m-{degree}"] / 1e6, 1) for degree in (2, 4, 6)] == [122.3, 122.9, 121.6]
    sizes = {"125m": 125e6, "350m": 350e6, "760m": 760e6}
    for name, config in PRESETS.items():
        assert config.parameters == pytest.approx(sizes[name.split("-")[1]], rel=0.02)


def test_the_first_embedding_has_the_deviation_that_is_asked_for() -> None:
    first, wide = (_drawn(replace(GPT, embedding_deviation=deviation)) for deviation in (0.02, 0.1))
    assert wide.embedding.weight.std().item() == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(wide.embedding.weight, 5 * first.embedding.weight)
    others = dict(first.named_parameters())
    for name, parameter in wide.named_parameters():
        assert name == "embedding.weight" or torch.equal(parameter, others[name])


def _drawn(config: KrakenConfig) -> KrakenLM:
    torch.manual_seed(0)
    return KrakenLM(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "no multiple of 5 heads"),
        ({"kv_heads": 3}, "no multiple of 3 key"),
        ({"degree": 0}, "at least one of its degree"),
        ({"norm": "batch"}, "norm of a Kraken model: choose from layer, rms"),
        ({"positions": "rotary", "width": 36}, "heads of 9 are odd"),
        ({"expansion": 0.0}, "expansion of a Kraken model must be a number above 0"),
        ({"expansion": 0.001}, "makes no FFN"),
        ({"expansion": 1e307}, "makes no FFN"),
        ({"expansion": "2"}, "expansion of a Kraken model must be a number above 0"),
        ({"width": 48.0}, "width of a Kraken model must be a whole number, not 48.0"),
        ({"layers": True}, "layers of a Kraken model must be a whole number"),
        ({"embedding_deviation": 0.0}, "embedding_deviation of a Kraken model must be a number above 0"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(GPT, **changes)


def test_a_directory_holds_the_model(tmp_path: Path) -> None:
    model = model_of(LLAMA)
    save_native(model, tmp_path / "model")
    again = load_native(tmp_path / "model")
    ids = torch.randint(100, (1, 8))
    assert again.config == LLAMA
    assert torch.equal(again(ids), model(ids))
    assert load_native(tmp_path / "model", torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def _without(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def _truncated(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])


def _other_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "embedding.weight": torch.zeros(3, 3)}, folder / WEIGHTS_FILE)


def _other_heads(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"heads": 7}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_without, InputFileError, "cannot be read"),
        (_truncated, InputFileError, "cannot be read"),
        (_other_shape, InputFileError, "'embedding.weight' has the shape"),
        (_other_heads, UsageError, "no multiple of 7 heads"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, damage: Any, error: type[Exception], message: str) -> None:
    save_native(model_of(GPT), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=message):
        capture(tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt", "llama", "four lanes"])
def test_one_sum_a_layer_hides_behind_the_next_attention(name: str) -> None:
    config = CONFIGS[name]
    captured = capture(model_of(config))
    program = lower_native(captured.program, config.degree)
    assert captured.lanes == program.degree == config.degree
    assert len(program.plan.reduces) == config.layers
    for window, reduce in zip(program.windows[:-1], program.plan.reduces[:-1], strict=True):
        assert reduce.window == (reduce.last + 1,), "the attention of the next layer"
        assert reduce.awaited_by == reduce.last + 2, "its FFN"
        # Query, key, value, attention, out.
        assert len(window.gemms) == 5
    assert program.windows[-1].gemms == ()
    assert program.cached is not None


def test_a_model_of_one_lane_is_compiled_too() -> None:
    model, ids = model_of(CONFIGS["one lane"]), torch.randint(100, (2, 9))
    torch.testing.assert_close(kraken_compiler.transform(model)(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_transformed_lanes_are_the_model_and_train() -> None:
    model = model_of(LLAMA)
    ids = torch.randint(100, (2, 16))
    lanes = kraken_compiler.transform(model)
    torch.testing.assert_close(lanes(ids), model(ids), rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(lanes(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    model.loss(ids).backward()
    wanted = {name: one.grad for name, one in model.named_parameters()}
    compared = 0
    for name, parameter in lanes.named_parameters():
        source = lanes.program.weights[name.removeprefix("weights.")].source
        for lane in range(LLAMA.degree if ANY_LANE in source else 0):
            assert parameter.grad is not None
            gradient = wanted[lane_source(source, lane)]
            torch.testing.assert_close(parameter.grad[lane], gradient, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == sum(name.startswith("lanes.") for name in wanted)


def test_what_a_native_model_has_no_use_for_is_refused(tmp_path: Path) -> None:
    model = model_of(GPT)
    for options, message in (
        ({"degree": 2}, "trained with 3 lanes"),
        ({"form": "ladder"}, "--form"),
        ({"layers": "1"}, "--layers"),
        ({"lanes": "affinity"}, "--lanes"),
        ({"calibrate": [tmp_path / "text.txt"]}, "--calibrate"),
        ({"embedding": "whole"}, "--embedding"),
    ):
        with pytest.raises(UsageError, match=message):
            compile_model(model, None, **options)
    with pytest.raises(UsageError, match="trained with 3 lanes"):
        kraken_compiler.transform(model, degree=4)


def _other_kind(model: KrakenLM) -> None:
    model.lane(1).layer(0).ffn = torch.nn.Identity()


def _hooked(model: KrakenLM) -> None:
    model.lane(1).layer(0).ffn.register_forward_hook(lambda module, args, output: 2 * output)


def _widened(model: KrakenLM) -> None:
    model.lane(2).layer(1).ffn.up.bias = torch.nn.Parameter(torch.zeros(3))


def _emptied(model: KrakenLM) -> None:
    del model.lane(0).layer(0).ffn.up.bias
    model.lane(0).layer(0).ffn.up.bias = None  # type: ignore[assignment]


class _Louder(KrakenLM):
    def forward(self, input_ids: Tensor) -> Tensor:
        return 2 * super().forward(input_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_kind, "'lanes.1.layers.0.ffn': is a Identity"),
        (_hooked, "'lanes.1.layers.0.ffn': has hooks"),
        (_widened, "'lanes.2.layers.1.ffn.up.bias': does not have the shape"),
        (_emptied, "'lanes.0.layers.0.ffn.up.bias': is missing"),
    ],
)
def test_a_model_with_an_exchanged_part_is_refused(change: Any, message: str) -> None:
    """One lane is captured for all of them, so nothing but a comparison would see what another one does."""
    model = model_of(GPT)
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        capture(model)
    with pytest.raises(UnsupportedModelError, match="is a _Louder"):
        capture(_Louder(GPT).eval())


def test_a_plan_tells_its_times() -> None:
    model = model_of(replace(LLAMA, context=600)).to(torch.bfloat16)
    result = compile_model(model, None, machine="h100-sxm")
    assert result.report.data["exact"]
    assert result.report.data["lanes"][0]["heads"] == LLAMA.heads
    (table,) = result.latencies
    assert [line.split()[2:] for line in table.lines() if line.startswith("batch")][1][:2] == ["native", "computes"]
    (load, *_) = table.rows
    assert (load.prompt, list(table.rows[load])) == (128, ["native", "native, two halves", "no communication"])
    prefill = table.rows[load]["native"].prefill
    assert prefill.hidden > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("gpt", "torch"), ("llama", "torch"), ("llama", "onnx")])
def test_ranks_and_devices_compute_the_model(tmp_path: Path, name: str, backend: str) -> None:
    config, model = CONFIGS[name], model_of(CONFIGS[name])
    save_native(model, tmp_path / "model")
    out = tmp_path / "out"
    result = compile_model(tmp_path / "model", out, backends=(backend,))
    assert result.verification is not None
    comparisons = result.verification.comparisons
    assert all(one.max_rel_error < 1e-5 for one in comparisons)
    whats = {one.what for one in comparisons}
    assert "lanes against the source" in whats
    assert any("with a KV cache" in what for what in whats)
    assert any("two halves" in what for what in whats)
    assert json.loads((out / "manifest.json").read_text())["degree"] == config.degree
    again = verify_artifact(out)
    assert any(one.what == "lanes against the source" for one in again.comparisons)


@pytest.mark.slow
def test_a_native_artifact_is_not_healed(tmp_path: Path) -> None:
    save_native(model_of(GPT), tmp_path / "model")
    compile_model(tmp_path / "model", tmp_path / "out", verify=False)
    (tmp_path / "text.txt").write_text("a" * 100)
    with pytest.raises(UsageError, match="nothing to heal"):
        heal_artifact(tmp_path / "out", HealSettings(steps=1), texts=[tmp_path / "text.txt"])
