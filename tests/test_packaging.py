"""The package as others meet it: what an import costs, what the repository shows at its root."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


@pytest.mark.slow
def test_import_is_light() -> None:
    """`import kraken_compiler` costs what `import torch` costs."""
    code = "import sys, kraken_compiler; print(*({'transformers', 'onnx', 'onnxruntime', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_root_link_is_committed_as_a_link(root: Path, name: str) -> None:
    assert (root / name).is_symlink()
    assert os.readlink(root / name) == f"kraken_compiler/{name}"


def test_packages_are_only_ours(root: Path) -> None:
    """The links at the root must not become top-level packages of the wheel."""
    from setuptools import find_packages

    project = tomllib.loads((root / "pyproject.toml").read_text())
    found = find_packages(str(root), **project["tool"]["setuptools"]["packages"]["find"])
    assert {name.split(".")[0] for name in found} == {"kraken_compiler"}
    with_code = {".".join(path.parent.relative_to(root).parts) for path in (root / "kraken_compiler").rglob("*.py")}
    assert with_code <= set(found), f"without __init__.py: {sorted(with_code - set(found))}"


def test_model_packages_are_pinned(root: Path) -> None:
    lines = (root / "requirements" / "models.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted
    assert all("==" in line for line in wanted)
