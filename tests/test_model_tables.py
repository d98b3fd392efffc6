"""What docs/ says of the models is what the tests hold: `make tables` was not forgotten."""

from __future__ import annotations

import re

from tests.write_tables import OVERVIEW, PAGE, model_list
from tests.zoo import MORE_FAMILIES, OTHER_INPUTS, REJECTED, SUPPORTED


def test_the_page_has_every_model() -> None:
    lines = PAGE.read_text().splitlines()
    models = [line.split("|")[1].strip(" `") for line in lines if re.match(r"\| `\w+` \|", line)]
    assert sorted(models) == sorted([*SUPPORTED, *OTHER_INPUTS, *MORE_FAMILIES])
    rejected = [line.split("`")[1] for line in lines if line.startswith("- `")]
    assert rejected == sorted(REJECTED)


def test_the_overview_lists_what_the_tests_hold() -> None:
    assert model_list() in OVERVIEW.read_text()
