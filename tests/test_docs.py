"""The code in docs/ runs, and does what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kraken_compiler.lowering import lower
from tests.passes.helpers import captured, check_pass, check_untouched, gpt, hidden
from tests.passes.test_drop_noops import Apply

DOCS = Path(__file__).parent.parent / "docs"


def run_first_block(page: str) -> dict[str, Any]:
    """The names that the first Python block of a page defines."""
    block = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert block is not None
    # dataclasses look their module up by name.
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(block[1], page, "exec"), names)
    return names


def test_adding_a_form(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_first_block("adding-a-form.md")
    assert "late" in capsys.readouterr().out
    assert names["module"](torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 100)


def test_adding_a_pass() -> None:
    step = run_first_block("adding-a-pass.md")["FuseSilu"]()
    check_pass(step, captured(Apply(lambda x: x * x.sigmoid()), hidden(4)), matches=1)
    check_untouched(step, captured(Apply(lambda x: x * x.cos().sigmoid()), hidden(4)))


def test_adding_a_backend(tmp_path: Path) -> None:
    backend = run_first_block("adding-a-backend.md")["TextBackend"]()
    program, _ = lower(gpt(2).program, 2, "kraken")
    windows = backend.write(program, gpt(2).read, tmp_path)
    assert [len(window.gemms) for window in windows] == [5, 0]
    assert {"lane.txt", "lane-0.safetensors", "lane-1.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_links_between_pages() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([\w.-]+\.md)\)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name} links to {target}"


def test_commands_name_files_that_exist() -> None:
    for page in DOCS.glob("*.md"):
        for path in re.findall(r"\b(?:tests|examples|kraken_compiler|passes)/[\w/]+\.py\b", page.read_text()):
            root = DOCS.parent
            assert (root / path).exists() or (root / "kraken_compiler" / path).exists(), f"{page.name} names {path}"
