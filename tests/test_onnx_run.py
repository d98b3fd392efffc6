"""`kraken-run --backend onnx` and its worker: the torch backend's tokens, without torch in the ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.load import load
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.onnx_ort.run.array_decoder import ArrayDecoder
from kraken_compiler.backends.onnx_ort.run.model import open_device
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.cli.run import app
from kraken_compiler.errors import RankFailedError, UsageError
from kraken_compiler.generate.decoder import RecomputingDecoder
from kraken_compiler.generate.loop import GREEDY, generate
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.generate.worker import main
from kraken_compiler.lanes.logits import logits_function
from kraken_compiler.lanes.module import LaneModule
from kraken_compiler.passes.lower import lower
from kraken_compiler.ranks.heartbeat import is_of_peer
from tests.test_cli_compile import kill_a_rank, save_tokenizer
from tests.test_families import lane_program, recognized
from tests.toy_lane_program import edit_manifest, write_toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

PROMPTS = [[5, 6, 40, 8, 9], [7], [20, 21, 22]]
SAMPLED = Sampling(2.0, top_k=50, top_p=0.98, seed=3)

RANK = """
import sys
from kraken_compiler.generate.worker import main
for file in sys.argv[1:]:
    main(["--options-file", file])
loaded = {"torch", "transformers"} & {name.partition(".")[0] for name in sys.modules}
assert not loaded, f"a rank imports {loaded}"
"""


@dataclass(frozen=True)
class Artifacts:
    """Llamas with both backends, and a program without a KV cache."""

    standard: Path
    kraken: Path
    uncached: Path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    place = tmp_path_factory.mktemp("onnx")
    backends = [TorchBackend(), OnnxBackend()]
    source = Source(kind="module", name="llama")
    for form in ("standard", "kraken"):
        write_artifact(
            lane_program("llama", 2, form),
            recognized("llama").read,
            place / form,
            source=source,
            backends=backends,
            tokenizer_saver=save_tokenizer,
        )
    return Artifacts(place / "standard", place / "kraken", write_toy(place / "toy", 2, backends=backends))


def tokens_of_torch(
    artifact: Path, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """What the torch backend's program says, all lanes in this process and without a cache."""
    module, manifest = load(artifact), open_artifact(artifact).manifest
    assert isinstance(module, LaneModule)
    logits_of = logits_function(manifest.inputs, manifest.call, module.run_flat)
    decoder = RecomputingDecoder(lambda ids: logits_of(torch.from_numpy(ids)).detach().numpy(), len(prompts), 100)
    return [list(row) for row in zip(*generate(decoder, prompts, count, sampling=sampling))]


def on_ranks(directory: Path, runs: Sequence[RunOptions]) -> list[list[list[int]]]:
    """Several runs, one after the other, on the same two processes; returns the tokens of every row of every run."""
    files = []
    for number, options in enumerate(runs):
        files.append(str(directory / f"options-{number}.json"))
        Path(files[-1]).write_text(options.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", RANK, *files]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "KRAKEN_MEET": meet},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[1] == ("", ""), "only rank 0 speaks"
    found, text = [], said[0][0]
    while text:
        document, end = json.JSONDecoder().raw_decode(text)
        found.append([result["ids"] for result in document["results"]])
        text = text[end:].lstrip()
    return found


def ids_options(artifact: Path, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any) -> RunOptions:
    texts = [",".join(map(str, prompt)) for prompt in prompts]
    return RunOptions(**{"artifact": artifact, "backend": "onnx", "input_ids": texts, "json": True} | options)


def sampled(sampling: Sampling) -> Mapping[str, Any]:
    names = ("temperature", "top_k", "top_p", "seed")
    return {name: getattr(sampling, name) for name in names}


def test_the_tokens_are_those_of_the_torch_backend(artifacts: Artifacts, tmp_path: Path) -> None:
    """Greedy and sampled, rows of different lengths, with a KV cache and without; no rank imports torch."""
    runs = []
    expected = []
    for artifact in (artifacts.standard, artifacts.kraken, artifacts.uncached):
        for sampling in (Sampling(), SAMPLED):
            runs.append(ids_options(artifact, max_new_tokens=8, threads=1, **sampled(sampling)))
            expected.append(tokens_of_torch(artifact, PROMPTS, 8, sampling))
    # Rounded sums change the numbers, not the most likely first token of this model.
    runs.append(ids_options(artifacts.standard, max_new_tokens=1, reduce_dtype="bfloat16"))
    expected.append([row[:1] for row in expected[0]])
    assert on_ranks(tmp_path, runs) == expected


def kraken_run(*arguments: str | Path, lines: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kraken_compiler.cli.run", *map(str, arguments)]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=False, timeout=120)


def test_text_from_the_command(artifacts: Artifacts) -> None:
    done = kraken_run(artifacts.kraken, "--backend", "onnx", "--prompt", "w5 w6 w40", "--max-new-tokens", "5", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (result,) = json.loads(done.stdout)["results"]
    (expected,) = tokens_of_torch(artifacts.kraken, [[5, 6, 40]], 5)
    assert result["ids"] == expected
    assert result["text"] == "".join(f" w{token}" for token in expected)


def test_lines_of_standard_input(artifacts: Artifacts) -> None:
    arguments = ("--backend", "onnx", "--max-new-tokens", "3", "--provider", "CPUExecutionProvider")
    done = kraken_run(artifacts.standard, *arguments, lines="w5 w6\nw7\n")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [tokens_of_torch(artifacts.standard, [prompt], 3)[0] for prompt in ([5, 6], [7])]
    assert done.stdout.splitlines() == ["".join(f" w{token}" for token in answer) for answer in answers]


def test_the_example(artifacts: Artifacts, root: Path) -> None:
    command = [str(root / "examples/onnx_generate.py"), str(artifacts.kraken / "lanes"), "--ids", "5,6,40"]
    done = subprocess.run(
        [sys.executable, *command, "--tokens", "6"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (expected,) = tokens_of_torch(artifacts.kraken, [[5, 6, 40]], 6)
    assert done.stdout == ",".join(map(str, expected)) + "\n"


# one device ----------------------------------------------------------------------------------------------------------


def test_one_device_needs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "KRAKEN_MEET"):
        monkeypatch.delenv(name, raising=False)
    found = recognized("llama")
    program, _ = lower(found.captured, 1, "standard")
    OnnxBackend().write(program, found.read, tmp_path)
    with open_device(tmp_path / "device-0.onnx", threads=1) as device:
        decoder = ArrayDecoder(device, 1, 10)
        logits = decoder.prefill(np.array([[5, 6, 40]]), np.array([3]))
        assert logits.shape == (1, 97)
        # It goes back, and on from there.
        ids = np.array([[5, 6, 40, 7, 8, 9]])
        whole = ArrayDecoder(device, 1, 10).prefill(ids, np.array([6])).copy()
        decoder.rewind(2)
        again = decoder.prefill(ids[:, 2:], np.array([4]))
        assert np.abs(again - whole).max() <= 1e-5 * np.abs(whole).max()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(UsageError, match="is one of 1 devices, WORLD_SIZE is 3; start 1 process"),
        open_device(tmp_path / "device-0.onnx"),
    ):
        pass


# what is wrong -------------------------------------------------------------------------------------------------------


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(code: int, *arguments: str | Path) -> str:
    result = invoke(*arguments, "--input-ids", "5")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_an_execution_provider_that_is_not_there(artifacts: Artifacts) -> None:
    line = refused(2, artifacts.standard, "--backend", "onnx", "--provider", "NoExecutionProvider")
    there = ", ".join(onnxruntime.get_available_providers())
    assert line == f"error: this ONNX Runtime has no NoExecutionProvider; it has {there}\n"


def test_options_that_do_not_go_together(artifacts: Artifacts) -> None:
    assert "unknown backend 'tensorrt' (known: torch, onnx, vllm)" in refused(
        2, artifacts.standard, "--backend", "tensorrt"
    )
    for options, message in {
        "--backend onnx --compile": "--compile does not go with the onnx backend",
        "--backend onnx --device cuda": "--device does not go with the onnx backend: it is an option of torch",
        "--provider CPUExecutionProvider": "--provider does not go with the torch backend",
    }.items():
        assert message in refused(2, artifacts.standard, *options.split())


def test_a_backend_that_the_artifact_lacks(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", 2)
    line = refused(2, tmp_path / "toy", "--backend", "onnx")
    assert "was compiled without the onnx backend (it has: torch); compile it with --backend onnx" in line
    edit_manifest(tmp_path / "toy", backends={"onnx": {}})
    assert "was compiled without the torch backend (it has: onnx)" in refused(2, tmp_path / "toy", "--backend", "torch")
    # Without --backend the one that is there is taken, of which nothing but the name is there.
    assert "--compile does not go with the onnx backend" in refused(2, tmp_path / "toy", "--compile")


def test_the_worker_says_what_is_wrong(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(artifact: Path, *more: str, **environment: str) -> str:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as caught:
            main([str(artifact), "--backend", "onnx", "--input-ids", "1", *more])
        assert caught.value.code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        return said.err

    assert "start this through kraken-run or torchrun" in fails(artifacts.standard)
    line = fails(artifacts.standard, RANK="0", WORLD_SIZE="1")
    assert "the program has 2 lanes and 1 rank was started; start 2, or compile for degree 1" in line
    line = refused(5, damaged_copy(artifacts.standard, tmp_path / "copy"), "--backend", "onnx")
    assert "lane-1.safetensors: changed since it was written (its hash differs)" in line


def damaged_copy(artifact: Path, target: Path) -> Path:
    shutil.copytree(artifact, target)
    path = target / "lanes" / "lane-1.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return target


def test_a_killed_rank(artifacts: Artifacts) -> None:
    killer = threading.Thread(target=kill_a_rank, args=("kraken_compiler.generate.worker",))
    killer.start()
    result = invoke(artifacts.standard, "--backend", "onnx", "--input-ids", "5", "--max-new-tokens", "50")
    killer.join()
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "was killed by SIGKILL" in result.stderr.splitlines()[0]


def test_a_rank_that_lost_a_peer_is_not_the_one_to_blame() -> None:
    assert is_of_peer(RankFailedError("connection closed by peer: rank 1 went away while rank 0 needed its part"))
    assert is_of_peer(RankFailedError("rank 1 did not come to 127.0.0.1:5 within 3 s"))
    assert not is_of_peer(RankFailedError("rank 1 sent 3 bytes where rank 0 has 4"))
