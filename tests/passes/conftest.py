"""`pytest tests/passes --update-golden` rewrites the golden texts; nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.passes.helpers import Golden

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/passes/golden/*.txt")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    # The option is unknown when pytest starts above this folder and meets this file too late.
    return Golden(_GOLDEN, bool(request.config.getoption("--update-golden", default=False)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
