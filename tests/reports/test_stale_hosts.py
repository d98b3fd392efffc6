"""Hosts with different artifacts, versions or options: all ranks end in one line that says so, within seconds."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.open_model import rank_claims
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.ranks.communicators.agreement import THE_ARTIFACT, Claims, disagreement
from kraken_compiler.ranks.run_ranks import run_ranks
from tests.toy_lane_program import edit_manifest, toy_program, toy_sources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SECONDS = 60.0
"""Starting two ranks on a busy machine; the ranks' own timeout is far longer."""
DIFFERENT = "error: the ranks do not fit together: the compiled model (a hash of its program and weights) is "


def write(directory: Path, scale: float = 1.0, degree: int = 2, name: str = "Toy") -> Path:
    """The toy, with its first weight scaled."""
    sources = toy_sources()
    return write_artifact(
        toy_program(degree),
        lambda key: sources[key] * (scale if key == "embedding" else 1.0),
        directory,
        source=Source(kind="module", name=name),
        backends=[TorchBackend(), OnnxBackend()],
        report={"note": name},
    )


@dataclass(frozen=True)
class Artifacts:
    """A compiled model, the same compiled anew from elsewhere, and older weights of it."""

    new: Path
    again: Path
    old: Path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    place = tmp_path_factory.mktemp("hosts")
    return Artifacts(
        write(place / "a" / "toy.kraken"), write(place / "b" / "other.kraken", name="Moved"), write(place / "c", 1.25)
    )


def test_a_fingerprint_is_of_what_is_computed(artifacts: Artifacts, tmp_path: Path) -> None:
    def prints(directory: Path) -> str:
        return open_artifact(directory, verify=False).fingerprint()

    assert prints(artifacts.new) == prints(artifacts.again) == prints(shutil.copytree(artifacts.new, tmp_path / "x"))
    assert prints(artifacts.new) != prints(artifacts.old)
    edit_manifest(tmp_path / "x", forms=["kraken", "parallel"])
    assert prints(artifacts.new) != prints(tmp_path / "x")


def test_all_that_matters_is_claimed(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**others: object) -> object:
        given = {"artifact": artifacts.new, "backend": "torch", "reduce_dtype": None} | others
        artifact = open_artifact(str(given["artifact"]), verify=False)
        other = Claims(rank_claims(artifact, str(given["backend"]), given["reduce_dtype"]))
        return disagreement({0: mine, 1: mine, 2: other})

    mine = Claims(rank_claims(open_artifact(artifacts.new, verify=False), "torch"))
    assert told() is told(artifact=artifacts.again) is None
    assert isinstance(told(artifact=artifacts.old), InputFileError)
    assert str(told(reduce_dtype="bfloat16")).endswith(
        "--reduce-dtype is not given on ranks 0, 1 and bfloat16 on rank 2"
    )
    assert "the backend is torch on ranks 0, 1 and onnx on rank 2" in str(told(backend="onnx"))
    monkeypatch.setattr("kraken_compiler.backends.open_model.own_version", lambda: "9.9")
    assert isinstance(told(), UsageError)
    assert "the version of kraken-compiler is" in str(told())
    assert "and 9.9 on rank 2" in str(told())


def test_a_rank_in_trouble_is_named() -> None:
    found = disagreement({0: Claims({"a": "1"}), 1: Claims(trouble=InputFileError("m: missing")), 2: Claims()})
    assert isinstance(found, InputFileError)
    assert str(found) == "rank 1: m: missing"
    different = disagreement({0: Claims({THE_ARTIFACT: "1"}), 1: Claims({THE_ARTIFACT: "2"})})
    assert isinstance(different, InputFileError)
    assert different.exit_code == 5


def hosts(module: str, *arguments: list[str]) -> tuple[list[int], list[str]]:
    """One rank a host, each with arguments of its own; exit codes, and the last line that each says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *given, "--input-ids", "1,2,3", "--max-new-tokens", "2", "--timeout", "600"],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(len(arguments)),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, given in enumerate(arguments)
    ]
    try:
        said = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert time.monotonic() - began < SECONDS
    assert not any("Traceback" in text for text in said), said
    return [rank.returncode for rank in ranks], [(text.splitlines() or [""])[-1] for text in said]


WORKER = "kraken_compiler.generate.worker"
BACKENDS = pytest.mark.parametrize("backend", ["torch", "onnx"])


@BACKENDS
def test_older_weights_on_one_host(artifacts: Artifacts, backend: str) -> None:
    codes, lines = hosts(WORKER, [str(artifacts.new), "--backend", backend], [str(artifacts.old), "--backend", backend])
    assert codes == [5, 5]
    assert lines[0] == lines[1]
    assert lines[0].startswith(DIFFERENT)
    assert lines[0].endswith(" on rank 1; copy one to all hosts")


def test_the_same_weights_compiled_on_each_host_run(artifacts: Artifacts) -> None:
    assert hosts(WORKER, [str(artifacts.new)], [str(artifacts.again)])[0] == [0, 0]


@BACKENDS
def test_other_options_on_one_host(artifacts: Artifacts, backend: str) -> None:
    given = [str(artifacts.new), "--backend", backend]
    codes, lines = hosts(WORKER, given, [*given, "--reduce-dtype", "bfloat16"])
    assert codes == [2, 2]
    assert lines[0] == lines[1]
    assert lines[0].endswith("--reduce-dtype is not given on rank 0 and bfloat16 on rank 1")


@BACKENDS
def test_a_damaged_artifact_on_one_host(artifacts: Artifacts, tmp_path: Path, backend: str) -> None:
    damaged = shutil.copytree(artifacts.new, tmp_path / "damaged")
    (damaged / "report.json").unlink()
    codes, lines = hosts(WORKER, [str(artifacts.new), "--backend", backend], [str(damaged), "--backend", backend])
    assert codes == [5, 5]
    assert "report.json: missing from the artifact" in lines[1]
    assert lines[0].startswith("error: rank 1: ")
    assert "report.json: missing from the artifact" in lines[0]


def test_another_degree_on_one_host(artifacts: Artifacts, tmp_path: Path) -> None:
    write(tmp_path / "one", degree=1)
    codes, lines = hosts(WORKER, [str(artifacts.new)], [str(tmp_path / "one")])
    assert codes == [2, 2]
    assert "the program has 1 lanes and 2 ranks were started" in lines[0]


def test_programs_of_the_python_api_compare_at_their_first_run(artifacts: Artifacts) -> None:
    payload = {"artifacts": [str(artifacts.new), str(artifacts.old)]}
    first, second = run_ranks("tests.reports.running_functions:load_and_run", 2, payload)
    assert first == second
    assert first[0].startswith("InputFileError: the ranks do not fit together")
    assert first[1] == "ran"


def test_a_call_of_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq

    from kraken_compiler.ranks.communicators import rendezvous as meeting

    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point = meeting.RendezvousPoint("127.0.0.1", free.getsockname()[1])
    with zmq.Context() as context, context.socket(zmq.DEALER) as old:
        old.setsockopt(zmq.LINGER, 0)
        old.connect(f"tcp://{point}")
        old.send(json.dumps({"version": 1, "rank": 1, "degree": 2, "same": {}, "card": {}}).encode())
        with pytest.raises(UsageError, match="rank 1 has another version of kraken-compiler than rank 0 has"):
            meeting.rendezvous(0, 2, point, {}, timeout=5.0)
