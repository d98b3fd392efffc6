"""Numbers in what is printed and kept: as text for people, and in JSON documents, which know no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def number_text(value: float, spec: str) -> str:
    """A number for people; `spec` is how `format` writes a finite one, e.g. ".3g"."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return format(value, spec)


def json_text(data: Any, *, sort_keys: bool = False) -> str:
    """A JSON document; null stands for numbers that are infinite or not a number, for which JSON has no word."""
    return json.dumps(_finite(data), indent=1, sort_keys=sort_keys, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
