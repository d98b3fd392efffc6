"""A server of a compiled real model, as users start it and as their clients speak to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.cli_command import run_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

START_SECONDS, END_SECONDS = 300, 120


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 for two lanes; its 9 heads are shared unevenly."""
    out = tmp_path_factory.mktemp("compiled") / "smol"
    options = ("--degree", "2", "--form", "standard", "--backend", "torch,vllm", "-o", str(out), "--quiet")
    run_process("compile", smollm2_gguf, *options)
    return out


class Server:
    """A server that is starting or has started.

    Attributes:
        process: What was started.
        log: What it says.
        address: Of its API.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.process, self.log, self.port = process, log, port
        self.address = f"http://127.0.0.1:{port}"

    def wait_until_ready(self) -> None:
        """Wait for it; if it ends before, show why."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return
        pytest.fail(self.log.read_text()[-4000:])

    def wait_until_ended(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        return self.process.wait(START_SECONDS), self.log.read_text()


@contextmanager
def started(artifact: Path, log: Path, *options: str) -> Iterator[Server]:
    """`kraken-serve`, ended with all its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "kraken_compiler.cli.serve",
        str(artifact),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    # No compile: that takes a minute, and what is served is the same.
    line += ["--enforce-eager", "--max-model-len", "512", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield Server(process, log, port)
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            _, alive = psutil.wait_procs(children, END_SECONDS)
            for one in alive:
                one.kill()
            process.wait(END_SECONDS)


def test_a_client_streams_what_the_ranks_say(smollm2: Path, tmp_path: Path) -> None:
    from openai import OpenAI

    prompt, new_tokens = "The capital of France is", 16
    want = run_process("run", smollm2, "--prompt", prompt, "--max-new-tokens", str(new_tokens)).stdout
    with started(smollm2, tmp_path / "log") as server:
        server.wait_until_ready()
        client = OpenAI(base_url=f"{server.address}/v1", api_key="none")
        (model,) = client.models.list().data
        stream = client.completions.create(
            model=model.id, prompt=prompt, max_tokens=new_tokens, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].text for chunk in stream]
        assert len([piece for piece in pieces if piece]) > new_tokens // 2
        assert "".join(pieces) == want.removesuffix("\n")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        chat = client.chat.completions.create(model=model.id, messages=question, max_tokens=24, temperature=0)
        assert "Paris" in (chat.choices[0].message.content or "")
        number = client.completions.create(
            model=model.id,
            prompt="The answer is",
            max_tokens=4,
            extra_body={"structured_outputs": {"regex": "[0-9]{3}"}},
        )
        assert number.choices[0].text.isdigit()
        metrics = urllib.request.urlopen(f"{server.address}/metrics", timeout=30).read().decode()
        assert "vllm:generation_tokens_total" in metrics


def test_a_killed_worker_ends_the_server(smollm2: Path, tmp_path: Path) -> None:
    with started(smollm2, tmp_path / "log") as server:
        server.wait_until_ready()
        workers = [one for one in psutil.Process(server.process.pid).children(recursive=True) if "Worker" in one.name()]
        assert workers, [one.name() for one in psutil.Process(server.process.pid).children(recursive=True)]
        os.kill(workers[-1].pid, signal.SIGKILL)
        code, said = server.wait_until_ended()
        assert code == 1
        assert "died unexpectedly" in said
        ours = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(ours) == 1
        assert ours[0].startswith("error: vLLM's server ended by itself (exit code 0): ")


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ("nothing", ["--pipeline-parallel-size", "2"], "a compiled model does not take --pipeline-parallel-size"),
        ("nothing", ["--enable-lora"], "a compiled model does not take --enable-lora"),
        ("tampered", [], "lane-1.safetensors: changed since it was written"),
    ],
)
def test_what_cannot_be_served_is_refused(
    smollm2: Path, tmp_path: Path, change: str, options: list[str], reason: str
) -> None:
    artifact = smollm2
    if change == "tampered":
        artifact = tmp_path / "artifact"
        shutil.copytree(smollm2, artifact)
        with (artifact / "lanes" / "lane-1.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            (last,) = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
    with started(artifact, tmp_path / "log", *options) as server:
        code, said = server.wait_until_ended()
    assert code != 0
    assert reason in said


def test_another_degree_is_refused_by_vllm_itself(smollm2: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    done = subprocess.run(
        [*line, "--tensor-parallel-size", "3"], capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode != 0
    assert "has 2 lanes: run it with --tensor-parallel-size 2, not 3" in done.stdout + done.stderr
