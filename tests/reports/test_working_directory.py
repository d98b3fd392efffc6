"""Scripts in the working directory that are called like modules: no rank imports them, whoever started it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.backends.onnx_ort.backend import OnnxBackend
from kraken_compiler.backends.torch_dist.backend import TorchBackend
from kraken_compiler.backends.write_artifact import write_artifact
from kraken_compiler.ranks.import_path import folder_of, load_package
from kraken_compiler.ranks.run_ranks import run_ranks
from kraken_compiler.weights.store import MemoryStore
from tests.toy_lane_program import toy_program, toy_sources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SCRIPTS = ("queue", "json", "torch", "ctypes", "runpy", "signal", "typer", "zmq", "onnxruntime", "secrets", "pydantic")
PACKAGES = ("numpy", "kraken_compiler", "safetensors", "multiprocessing", "typing_extensions")
ASK = ("--input-ids", "1,2,3", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(
        toy_program(2),
        MemoryStore(toy_sources()).read,
        tmp_path_factory.mktemp("toy") / "toy.kraken",
        source=Source(kind="module", name="Toy"),
        backends=[TorchBackend(), OnnxBackend()],
    )


def users_folder(place: Path, packages: tuple[str, ...] = PACKAGES) -> Path:
    """A folder of scripts that leave their name in a file when they run, and then fail."""
    place.mkdir()
    content = f"open({str(place / 'ran')!r}, 'a').write(__name__ + chr(10)); raise SystemExit('a script')"
    for name in SCRIPTS:
        (place / f"{name}.py").write_text(content)
    for name in packages:
        (place / name).mkdir()
        (place / name / "__init__.py").write_text(content)
    return place


def started(place: Path, command: list[str], **environment: str) -> str:
    """What a command writes to standard output in that folder, where nothing of the user's may run."""
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, timeout=150, check=False
    )
    assert not (place / "ran").exists(), (place / "ran").read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


def console_script(name: str) -> list[str]:
    """A command as its console script starts it, which looks beside itself and not in the working directory."""
    return [sys.executable, "-P", "-m", f"kraken_compiler.cli.{name}"]


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_kraken_run(artifact: Path, tmp_path: Path, backend: str) -> None:
    place = users_folder(tmp_path / "mine")
    assert started(place, [*console_script("run"), str(artifact), *ASK, "--backend", backend]).count(",") == 2


def test_kraken_verify(artifact: Path, tmp_path: Path) -> None:
    assert started(users_folder(tmp_path / "mine"), [*console_script("verify"), str(artifact)])


def test_torchrun_with_the_variable_of_the_documentation(artifact: Path, tmp_path: Path) -> None:
    place = users_folder(tmp_path / "mine")
    assert started(place, [*torchrun(), "-m", WORKER, str(artifact), *ASK], PYTHONSAFEPATH="1").count(",") == 2


def test_torchrun_without_it(artifact: Path, tmp_path: Path) -> None:
    """All but a package that is called like ours, which Python has imported before we are asked."""
    packages = tuple(name for name in PACKAGES if name != "kraken_compiler")
    place = users_folder(tmp_path / "mine", packages)
    (place / "runpy.py").unlink()  # also Python's own part of -m
    assert started(place, [*torchrun(), "-m", WORKER, str(artifact), *ASK]).count(",") == 2


WORKER = "kraken_compiler.generate.worker"


def torchrun() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    return [*command, "--master-addr", "localhost", "--master-port", str(port)]


def test_ranks_keep_what_pythonpath_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And find the function that they are to call, which lies where only the launcher looks for modules."""
    place, named = users_folder(tmp_path / "mine"), tmp_path / "named"
    named.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(named))
    for found in run_ranks("tests.reports.running_functions:modules_of", 2):
        assert str(named) in found
        assert "" not in found
        assert not any(path.startswith(str(place)) for path in found)
    assert not (place / "ran").exists()


def test_a_package_is_loaded_from_where_the_launcher_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder / "twice_there").mkdir(parents=True)
        (tmp_path / folder / "twice_there" / "__init__.py").write_text(f"WHERE = {folder!r}")
    monkeypatch.syspath_prepend(tmp_path / "first")
    load_package("twice_there", str(tmp_path / "second"))
    try:
        assert sys.modules["twice_there"].WHERE == "second"
        assert folder_of("twice_there") == str(tmp_path / "second")
    finally:
        del sys.modules["twice_there"]
    with pytest.raises(ModuleNotFoundError, match="there is no module 'nowhere'"):
        load_package("nowhere", str(tmp_path))
