"""The examples run as their docstrings say, each in a fresh Python and a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kraken_compiler.texts.read import sample_text

pytestmark = pytest.mark.slow


def _run(*command: str, cwd: Path, timeout: int = 250) -> str:
    """Run a command and return what it prints; what it said goes into the failure if there is one."""
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_model_pt_compiles_for_four_devices(root: Path, tmp_path: Path) -> None:
    _run(str(root / "examples/write_model_pt.py"), cwd=tmp_path)
    assert (tmp_path / "model.pt").stat().st_size > 1_000_000
    _run("-m", "kraken_compiler.cli.compile", "model.pt", "--degree", "4", "-o", "model.kraken", cwd=tmp_path)
    assert (tmp_path / "model.kraken" / "manifest.json").exists()


def test_transform_in_python(root: Path, tmp_path: Path) -> None:
    printed = _run(str(root / "examples/transform_in_python.py"), cwd=tmp_path)
    assert "torch.Size([2, 16, 1000])" in printed
    differences = {line.split()[0]: float(line.split()[-1]) for line in printed.splitlines() if "differs" in line}
    assert differences["standard"] < 1e-4 < differences["kraken"]


def test_heal_with_trainer(root: Path, tmp_path: Path) -> None:
    printed = _run(str(root / "examples/heal_with_trainer.py"), cwd=tmp_path)
    before, after = (float(word) for word in printed.splitlines()[-1].split() if word[:1].isdigit())
    assert after < 0.8 * before


def test_train_kraken(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sample_text() * 16)
    arguments = ("--text", "text.txt", "--steps", "2", "--tokens", "4")
    printed = _run(str(root / "examples/train_kraken.py"), *arguments, cwd=tmp_path, timeout=250)
    assert "2 steps, 4,096 tokens" in printed
    assert "2 ranks against the lanes in one process" in printed
    assert "\nThe Prime Minister" in printed


@pytest.mark.real
@pytest.mark.timeout(900)
def test_demo_speaks_of_paris(root: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    printed = _run(str(root / "examples/demo.py"), "--only", "standard", "--tokens", "2", cwd=tmp_path, timeout=850)
    assert smollm2_gguf.name in printed
    assert "The capital of France is[ Paris" in printed
