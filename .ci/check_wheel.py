"""Checks a built wheel. `check_wheel.py WHEEL SOURCE`, run outside SOURCE by a Python that has the wheel installed."""

from __future__ import annotations

import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path


def main(wheel: Path, source: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in packed if ".dist-info/" not in name}
    # The links `passes` and `backends` at the root are for people; as packages they would claim very common names.
    assert tops == {"kraken_compiler"}, f"top-level names in the wheel: {sorted(tops)}"

    written = {str(path.relative_to(source)) for path in (source / "kraken_compiler").rglob("*.py")}
    assert written <= packed, f"not in the wheel: {sorted(written - packed)}"
    assert "kraken_compiler/py.typed" in packed
    assert any(name.startswith("kraken_compiler/passes/normalize/") for name in packed)
    assert any(name.startswith("kraken_compiler/backends/torch_dist/") for name in packed)

    import kraken_compiler

    here = Path(kraken_compiler.__file__).resolve()
    assert here.is_relative_to(Path(sys.prefix).resolve()), f"imported from {here}, not from the wheel"
    heavy = {"transformers", "onnx", "onnxruntime"} & set(sys.modules)
    assert not heavy, f"import kraken_compiler imports {sorted(heavy)}"
    for name in ("passes", "backends"):
        assert find_spec(name) is None, f"{name} can be imported as a top-level package"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
