"""What tests note for the tables in the docs, if somebody collects it: `make tables`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = "KRAKEN_TABLES"
"""The environment variable that names the folder; without it nothing is noted."""


def note(check: str, model: str, **found: Any) -> None:
    """Note what a check of a model found; a later note of the same check and model replaces it."""
    folder = os.environ.get(FOLDER)
    if folder:
        content = {"check": check, "model": model, **found}
        Path(folder, f"{check}.{model}.json").write_text(json.dumps(content))
