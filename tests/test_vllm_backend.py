"""The vLLM backend without vLLM: what it writes, and what the commands say. `tests/vllm_engine/` runs it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kraken_compiler.backends.base import EngineSettings
from kraken_compiler.backends.vllm.run.engine import VllmEngine
from kraken_compiler.backends.vllm.run.environment import THREADS_BIND, engine_environment, server
from kraken_compiler.backends.vllm.run.options import EngineOptions
from kraken_compiler.cli.compile import app as compile_app
from kraken_compiler.cli.run import app as run_app
from kraken_compiler.cli.serve import app as serve_app
from kraken_compiler.cli.verify import app as verify_app
from tests.cli_command import Command
from tests.reports.small_models import LM, VOCABULARY, pickled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMPILE, RUN, SERVE, VERIFY = map(Command, (compile_app, run_app, serve_app, verify_app))
DEGREE = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pickled(LM, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An artifact for vLLM alone, and what its compile printed."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    return out, COMPILE.answer(*arguments(model, "vllm", out))


def arguments(model: Path, backends: str, out: Path) -> list[str | Path]:
    options = ("--degree", str(DEGREE), "--trust-pickle", "--input", "ids=int64[2,16]")
    return [model, *options, "--backend", backends, "-o", out]


def test_the_graphs_are_compared_on_real_ranks(compiled: tuple[Path, dict[str, Any]]) -> None:
    _, answer = compiled
    checks = [one for one in answer["verification"]["program"]["comparisons"] if "as vLLM runs them" in one["what"]]
    assert len(checks) == 4
    assert {"with a KV cache" in one["what"] for one in checks} == {True, False}
    assert all(one["passed"] and one["max_rel_error"] < 1e-5 for one in checks)


def test_vllm_finds_a_model_there(compiled: tuple[Path, dict[str, Any]]) -> None:
    out, _ = compiled
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["KrakenForCausalLM"]
    assert config["vocab_size"] == VOCABULARY
    record = json.loads((out / "lanes" / "engine_record.json").read_text())
    for name, of_lane in (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads")):
        assert config[name] == DEGREE * record["attentions"][0][of_lane]
    assert config["head_dim"] == record["attentions"][0]["head_size"]
    assert "config.json" in json.loads((out / "manifest.json").read_text())["files"]


def test_weights_are_not_written_a_second_time(
    model: Path, compiled: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    alone, _ = compiled
    COMPILE.answer(*arguments(model, "torch,vllm", tmp_path / "both"))
    COMPILE.answer(*arguments(model, "torch", tmp_path / "torch"))
    weights = [
        {path.name: path.read_bytes() for path in (out / "lanes").glob("*.safetensors")}
        for out in (alone, tmp_path / "both", tmp_path / "torch")
    ]
    assert weights[0] == weights[1] == weights[2]
    graphs = {path.name for path in (tmp_path / "both" / "lanes").glob("engine_*.json")}
    assert graphs == {f"engine_{name}.json" for name in ("body", "head", "prepare", "record")}


def test_a_verification_says_what_it_could_not_run(model: Path, compiled: tuple[Path, dict[str, Any]]) -> None:
    out, _ = compiled
    answer = VERIFY.answer(out, "--backend", "vllm", "--source", model, "--trust-pickle")
    assert any(reason.startswith("no run in the engine of the vllm backend") for reason in answer["skipped"])
    assert any("as vLLM runs them" in one["what"] for one in answer["program"]["comparisons"])
    assert "compiled without the onnx backend" in VERIFY.refused(2, out, "--backend", "onnx")


def test_what_cannot_be_done_is_said_in_one_line(
    model: Path, compiled: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = compiled
    assert "needs vLLM: pip install" in one_line(RUN, out, "--input-ids", "1,2", "--backend", "vllm")
    assert "has no tokenizer: name one with --tokenizer DIR" in one_line(SERVE, out)
    assert "needs vLLM: pip install" in one_line(SERVE, out, "--skip-tokenizer-init")
    assert f"has {DEGREE} lanes, so --tensor-parallel-size 2 is refused" in one_line(
        SERVE, out, "--tensor-parallel-size", "2"
    )
    assert "-tp 4 is refused" in one_line(SERVE, out, "-tp=4")
    COMPILE.answer(*arguments(model, "torch", tmp_path / "torch"))
    assert "compiled without the vllm backend (it has: torch)" in one_line(SERVE, tmp_path / "torch")
    (out / "lanes" / "lane-1.safetensors").rename(out / "lanes" / "gone")
    try:
        assert "lane-1.safetensors: missing from the artifact" in one_line(SERVE, out)
    finally:
        (out / "lanes" / "gone").rename(out / "lanes" / "lane-1.safetensors")


def one_line(command: Command, *arguments: str | Path) -> str:
    result = command.invoke(*arguments)
    assert result.exit_code != 0
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_model_that_keeps_no_keys_and_values_is_refused(tmp_path: Path) -> None:
    class Bidirectional(LM):
        """Tokens see those behind them."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids.flip(1)).flip(1)

    import kraken_compiler
    from kraken_compiler.errors import UsageError

    torch.manual_seed(0)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(UsageError, match="--backend vllm needs a program with a KV cache"):
        kraken_compiler.compile(
            Bidirectional().eval(), tmp_path / "out", degree=2, backends=["vllm"], example_inputs=(ids,)
        )
    assert not (tmp_path / "out").exists()


class _Params:
    """Stands for vLLM's."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def clone(self) -> _Params:
        return _Params(self.seed)


def test_rows_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[_Params] = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(TokensPrompt=dict))
    engine = VllmEngine.__new__(VllmEngine)
    engine._requests = 0
    engine._engine = SimpleNamespace(add_request=lambda name, prompt, params: added.append(params))
    for seed in (7, 7, None):
        engine._add([[1, 2], [1, 2]], _Params(seed))
    seeds = [params.seed for params in added]
    assert seeds[:2] == seeds[2:4]
    assert seeds[0] != seeds[1]
    assert seeds[4:] == [None, None]


def test_threads_that_were_asked_for_are_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with engine_environment(EngineSettings(threads=4)):
        assert (os.environ["OMP_NUM_THREADS"], os.environ[THREADS_BIND]) == ("4", "nobind")
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert THREADS_BIND not in os.environ
    with engine_environment(EngineSettings()):
        assert os.environ["OMP_NUM_THREADS"] == "1"


def test_options_of_another_kind_are_refused() -> None:
    for given in ("own", 5, None):
        with pytest.raises(ValueError, match="kraken takes an object"):
            EngineOptions.of(SimpleNamespace(additional_config={"kraken": given}))  # type: ignore[arg-type]


def test_without_a_package_called_vllm_its_module_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server("DIR")[1:] == ["-m", "kraken_compiler.backends.vllm.run.command_line", "serve", "DIR"]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0")
    assert server("DIR")[-2:] == ["serve", "DIR"]
