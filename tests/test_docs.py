"""The code in docs/ runs, and does what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.cli.compile import CompileCommand
from kraken_compiler.cli.heal import HealCommand
from kraken_compiler.cli.probe import ProbeCommand
from kraken_compiler.cli.report import ReportCommand
from kraken_compiler.cli.train import TrainCommand
from kraken_compiler.cli.verify import VerifyCommand
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.options.command_line import command_options
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.options.heal import HealOptions
from kraken_compiler.options.probe import ProbeOptions
from kraken_compiler.options.report import ReportOptions
from kraken_compiler.options.train import TrainOptions
from kraken_compiler.options.verify import VerifyOptions
from kraken_compiler.passes.lower import lower
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.training.from_scratch.settings import TrainSettings
from tests.passes.helpers import captured, check_pass, check_untouched, gpt, hidden
from tests.passes.test_drop_noops import Apply

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS.parent / "README.md", *DOCS.glob("*.md")]


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


@pytest.mark.slow
def test_a_native_model_is_trained_and_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_first_block("native.md")
    assert names["loss"].item() == pytest.approx(torch.tensor(512.0).log().item(), rel=0.1)
    assert (tmp_path / "native.kraken" / "manifest.json").exists()


def test_adding_a_backend(tmp_path: Path) -> None:
    backend = run_first_block("adding-a-backend.md")["TextBackend"]()
    program, _ = lower(gpt(2).program, 2, "kraken")
    windows = backend.write(program, gpt(2).read, tmp_path)
    assert [len(window.gemms) for window in windows] == [0, 5, 0]
    assert {"lane.txt", "lane-0.safetensors", "lane-1.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_links_between_pages() -> None:
    for page in PAGES:
        for target, place in re.findall(r"\]\(([\w./-]+\.(?:md|png))(?:#([\w-]+))?\)", page.read_text()):
            linked = page.parent / target
            assert linked.exists(), f"{page.name} links to {target}"
            if place:
                assert place in places(linked), f"{page.name} links to {target}#{place}"


def places(page: Path) -> set[str]:
    """What links to headings of a page call them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_linked_from_the_readme_or_another_page() -> None:
    linked = {target for page in PAGES for target in re.findall(r"\]\((?:docs/)?([\w-]+\.md)", page.read_text())}
    assert {page.name for page in DOCS.glob("*.md")} <= linked


def documented(page: str, heading: str = "") -> set[str]:
    """The names in the first column of the tables of a page, or of those under a heading."""
    text = (DOCS / page).read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else text
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


COMMANDS: dict[str, tuple[type[Any], ...]] = {
    "kraken-compile": (CompileCommand, CompileOptions),
    "kraken-run": (RunOptions,),
    "kraken-verify": (VerifyCommand, VerifyOptions),
    "kraken-probe": (ProbeCommand, ProbeOptions),
    "kraken-report": (ReportCommand, ReportOptions),
    "kraken-heal": (HealCommand, HealOptions, HealSettings),
    "kraken-train": (TrainCommand, TrainOptions, TrainSettings),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_config_file_has_its_row(command: str) -> None:
    keys = {option.key for option in command_options(*COMMANDS[command]).values() if option.in_config}
    assert documented("config.md", command) == keys


def test_every_key_of_the_manifest_has_its_row() -> None:
    assert documented("artifact.md", "The manifest") == set(Manifest.model_fields)


def test_every_variable_of_ours_has_its_row() -> None:
    code = [path for folder in ("kraken_compiler", "tests") for path in (DOCS.parent / folder).rglob("*.py")]
    ours = {name for path in code for name in re.findall(r'"(KRAKEN_[A-Z_]+)"', path.read_text())}
    assert {name for name in documented("environment.md") if name.startswith("KRAKEN_")} == ours


def test_commands_name_files_that_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"\b(?:tests|examples|kraken_compiler|passes)/[\w/]+\.py\b", page.read_text()):
            root = DOCS.parent
            assert (root / path).exists() or (root / "kraken_compiler" / path).exists(), f"{page.name} names {path}"
