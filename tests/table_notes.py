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


def note_trained(case: str, model: str, *, given: str, compiled: str, outcome: str, error: float | None = None) -> None:
    """Note what a test of a trained model found, a row of the page.

    Args:
        case: Names the row; rows are sorted by it.
        model: The model, and the package that carries it.
        given: The real input.
        compiled: Forms and degrees.
        outcome: What came out, in words.
        error: The largest relative error against what had to come out.
    """
    note("trained", case, of=model, given=given, compiled=compiled, outcome=outcome, error=error)
