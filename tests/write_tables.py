"""Writes the tables in the docs from what the tests noted: `make tables`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ONNX_HEAD = """# Families on ONNX Runtime

Every family that the torch backend supports, from a tiny random model, as two devices on stock ONNX Runtime: the
largest relative difference of the logits from the lanes in one process, over two batch and sequence sizes and over a
ragged batch with the KV cache (a prompt, then token by token). 1e-5 is allowed. `make tables` writes this page.

| family | standard | kraken |
|---|---|---|
"""


def main(directory: Path) -> None:
    """Write the pages."""
    records = [json.loads(path.read_text()) for path in directory.glob("onnx.*.json")]
    errors = {(record["family"], record["form"]): record["error"] for record in records}
    families = sorted({family for family, _ in errors})
    rows = [
        f"| `{family}` | {errors[family, 'standard']:.0e} | {errors[family, 'kraken']:.0e} |" for family in families
    ]
    (ROOT / "docs" / "onnx-families.md").write_text(_ONNX_HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
