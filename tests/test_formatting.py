"""Numbers that are infinite or none at all: said plainly to people, null in JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from kraken_compiler.cli.console import print_json
from kraken_compiler.text import json_text, number_text


def strictly(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"b": math.inf, "a": [1.5, -math.inf, {"nan": math.nan}], "c": (0, True, None, "NaN")}
    want = {"b": None, "a": [1.5, None, {"nan": None}], "c": [0, True, None, "NaN"]}
    assert json.loads(json_text(data), parse_constant=strictly) == want
    assert list(json.loads(json_text(data, sort_keys=True))) == ["a", "b", "c"]
    print_json(data)
    assert json.loads(capsys.readouterr().out, parse_constant=strictly) == want


def test_numbers_for_people() -> None:
    assert number_text(1234.56, ".4g") == "1235"
    assert number_text(0.25, ".1e") == "2.5e-01"
    assert [number_text(value, ".4g") for value in (math.inf, math.nan)] == ["infinite", "not a number"]
