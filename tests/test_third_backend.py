"""A backend that the package does not know: a folder and a row are all it takes, through every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reports.small_models import LM, VOCABULARY, pickled

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parent.parent
ROW = "[kraken_compiler.backends]\nnumpy = tests.numpy_backend.backend:NumpyBackend\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the backend's package is installed."""
    place = tmp_path_factory.mktemp("site")
    about = place / "numpy_backend-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy-backend\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ROW)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickled decoder."""
    return pickled(LM, tmp_path_factory.mktemp("model"))


def command(name: str, environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"kraken_compiler.cli.{name}", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


@pytest.mark.slow
def test_it_compiles_verifies_and_runs(model: Path, installed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--degree", "3", "--trust-pickle", "--input", "ids=int64[2,16]", "--numpy-indent", "1", "-o", out)
    made = command("compile", installed, model, "--backend", "numpy", *options)
    assert made.returncode == 0, made.stderr
    assert "program   3 numpy ranks against the lanes in one process (worst: rank " in made.stdout
    assert re.search(r"schedule  \d+ reduces, \d+ hidden, each behind at least [1-9]", made.stdout), made.stdout
    assert json.loads((out / "manifest.json").read_text())["backends"] == {"numpy": {"numpy_indent": 1}}
    assert (out / "lanes" / "numpy.json").read_text().startswith('{\n "nodes"')
    again = command("verify", installed, out, "--source", model, "--trust-pickle")
    assert again.returncode == 0, again.stderr
    assert "3 numpy ranks against the lanes" in again.stdout
    run = command("run", installed, out, "--input-ids", "5,6,7", "--max-new-tokens", "4", "--numpy-dtype", "float64")
    assert run.returncode == 0, run.stderr
    assert run.stdout == ",".join(map(str, continued([5, 6, 7], model, out))) + "\n"


def continued(ids: list[int], model: Path, artifact: Path) -> list[int]:
    """The most likely tokens of the compiled form, whose lanes are those of `transform`."""
    import kraken_compiler

    lanes = kraken_compiler.transform(
        torch.load(model, weights_only=False), 3, example_inputs=(torch.zeros(2, 16, dtype=torch.int64),)
    )
    begun = len(ids)
    with torch.no_grad():
        for _ in range(4):
            ids = [*ids, int(lanes(torch.tensor([ids]))[0, -1].argmax())]
    assert max(ids) < VOCABULARY
    return ids[begun:]


@pytest.mark.slow
def test_its_options_are_those_of_the_commands(model: Path, installed: dict[str, str], tmp_path: Path) -> None:
    assert "--numpy-indent" in command("compile", installed, "--help").stdout
    assert "--numpy-dtype" in command("run", installed, "--help").stdout
    assert "--numpy-indent" not in command("run", installed, "--help").stdout
    refused = command("compile", installed, model, "--numpy-indent", "1", "-o", tmp_path / "out")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: --numpy-indent 1 is an option of the numpy backend; add --backend numpy\n",
    )


def test_nothing_outside_of_the_backends_knows_one() -> None:
    """But for help texts: what a backend's name is says the registry, what it can do its class."""
    package = ROOT / "kraken_compiler"
    named = re.compile(
        r"torch_dist|onnx_ort|[\"'](?:onnx|torch|vllm)[\"']|onnxruntime|(?:Onnx|Torch|Vllm)Backend|backends\.vllm"
    )
    # These speak of the package of that name.
    of_the_package = ("_torch_compat.py", "capture/untouched.py", "ir/size_rules.py", "ops/structure_safety.py")
    of_one_engine = ("cli/serve.py",)  # `kraken-serve` is a front of vLLM.
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside.parts[0] == "backends" or inside.as_posix() in (*of_the_package, *of_one_engine):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if named.search(line) and "help=" not in line:
                found.append(f"{inside}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
