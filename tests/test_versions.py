"""Artifacts across versions of torch: what one wrote, another verifies, and both continue alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_command import run_process
from tests.reports.model_directories import save

pytestmark = pytest.mark.slow

OTHER = os.environ.get("KRAKEN_OTHER_PYTHON", "")
"""A Python that has another torch."""

needs_other = pytest.mark.skipif(not OTHER, reason="`make test-newest` names a Python with another torch")


def _torch_of(python: str) -> str:
    line = [python, "-c", "import torch; print(torch.__version__.partition('+')[0])"]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@needs_other
@pytest.mark.parametrize("form", ["standard", "kraken"])
@pytest.mark.parametrize("written_here", [True, False], ids=["written-here", "written-there"])
def test_an_artifact_opens_under_another_version(tmp_path: Path, written_here: bool, form: str) -> None:
    """All its programs run there, with the checks of a compile: the model is captured again, under that version."""
    if _torch_of(OTHER) == _torch_of(sys.executable):
        pytest.skip("the newest torch that installs here is the one that the suite runs on")
    writer, reader = (sys.executable, OTHER) if written_here else (OTHER, sys.executable)
    model, out = save(tmp_path / "model", num_hidden_layers=2), tmp_path / "out.kraken"
    options = ("--degree", "2", "--form", form, "--backend", "torch,onnx", "-o", out)
    run_process("compile", model, *options, python=writer)
    run_process("verify", out, python=reader)
    prompt = ("--input-ids", "5,9,11", "--max-new-tokens", "8")
    for backend in ("torch", "onnx"):
        runs = [run_process("run", out, *prompt, "--backend", backend, python=python) for python in (writer, reader)]
        assert len({done.stdout + done.stderr for done in runs}) == 1
