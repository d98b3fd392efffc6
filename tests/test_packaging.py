"""The package as others meet it: what an import costs, what the repository shows at its root."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = (
    *("errors", "text", "progress", "standard_streams", "_torch_compat", "surroundings"),
    *("ops", "ir", "native", "weights", "artifact", "passes", "capture", "ranks", "lanes", "latency", "backends"),
    *("options", "generate", "verify", "texts", "training", "quality", "report", "commands", "cli"),
)
"""The parts of the package from the lowest to the highest; see docs/architecture.md."""


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


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of every import of our own modules that happens when the code runs."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("kraken_compiler."))


def test_imports_run_one_way(root: Path) -> None:
    """Nothing imports what stands above it, in a function neither."""
    package = root / "kraken_compiler"
    parts = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(LAYERS)
    upwards = [
        f"{path.relative_to(root)}:{line}: imports {part}"
        for path in sorted(package.rglob("*.py"))
        if (own := path.relative_to(package).with_suffix("").parts[0]) != "__init__"
        for line, part in _imports(path)
        if LAYERS.index(part) > LAYERS.index(own)
    ]
    assert not upwards, "\n".join(upwards)
