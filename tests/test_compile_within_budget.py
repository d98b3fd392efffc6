"""`kraken-compile --max-kl`: the budget is honoured, measured anew on unseen text, or the compile fails."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.program import Program
from kraken_compiler.options.compile import share_of
from kraken_compiler.passes.compiler_pass import PassResult
from kraken_compiler.passes.recognize.find_layers import FindLayers
from kraken_compiler.quality.budget import Budget
from tests.test_cli_compile import done, refused, save_model
from tests.test_latency import TOML

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = random.Random(0).choices(range(3, 97), k=9000)
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("\n".join(" ".join(f"w{word}" for word in chosen[at : at + 10]) for at in range(0, 9000, 10)))
    return path


def compiled(model: Path, words: Path, target: Path, *options: object) -> dict[str, object]:
    calibrate = ("--calibrate", words, "--calibrate-tokens", "4096", "--no-verify")
    found: dict[str, object] = json.loads(
        done(model, "--degree", "2", "-o", target, *calibrate, *options, "--json").stdout
    )
    return found


def test_a_wide_and_a_narrow_budget(llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow one lies between what the candidates of the wide one's search cost. Each compile recognises once."""
    recognized: list[Program] = []
    run = FindLayers.run

    def noting(step: FindLayers, program: Program) -> PassResult:
        recognized.append(program)
        return run(step, program)

    monkeypatch.setattr(FindLayers, "run", noting)
    wide = compiled(llama, words, tmp_path / "wide", "--max-kl", "10")
    best = wide["choice"]["best"]  # type: ignore[index]
    count = len(best["forms"])
    # Which of the two costs less in a layer is known when it is measured; they spare the same.
    assert set(best["forms"]) <= {"kraken", "delayed"}
    # Of two sums a layer and the embedding's, its last one and the embedding's are waited for.
    most = 1 - 2 / (2 * count + 1)
    assert best["spared"] == pytest.approx(most)
    assert (tmp_path / "wide.sensitivity.json").exists()
    measured = wide["calibration"]["quality"][0]["after"]  # type: ignore[index]
    limit = 0.5 * measured["kl"]
    assert len(recognized) == 1

    narrow = compiled(llama, words, tmp_path / "narrow", "--max-kl", f"{limit}")
    assert len(recognized) == 2
    best = narrow["choice"]["best"]  # type: ignore[index]
    measured = narrow["calibration"]["quality"][0]["after"]  # type: ignore[index]
    assert 0 < best["spared"] < most
    assert best["kl"] <= limit
    assert measured["kl"] <= limit
    frontier = [candidate["spared"] for candidate in narrow["choice"]["frontier"]]  # type: ignore[index]
    assert frontier == sorted(frontier)
    manifest = json.loads((tmp_path / "narrow" / "manifest.json").read_text())
    assert manifest["forms"] == best["forms"]
    assert json.loads((tmp_path / "narrow" / "report.json").read_text())["choice"]["best"]["forms"] == best["forms"]


def test_a_budget_on_a_machine_saves_time(llama: Path, words: Path, tmp_path: Path) -> None:
    machine = tmp_path / "machine.toml"
    machine.write_text(TOML)
    load = ("--machine", machine, "--prompt", "32", "--new-tokens", "8")
    found = compiled(llama, words, tmp_path / "out", "--max-kl", "10", *load)
    choice = found["choice"]
    assert 0 < choice["best"]["seconds"] < choice["standard_seconds"]  # type: ignore[index]
    frontier = [candidate["seconds"] for candidate in choice["frontier"]]  # type: ignore[index]
    assert frontier == sorted(frontier, reverse=True)
    assert "--machine predicts times for" in refused(2, llama, "--machine", machine)
    alone = ("--degree", "1", "--max-kl", "10", "--calibrate", words, "-o", tmp_path / "none")
    assert "no form of any layer saves time on that machine" in refused(2, llama, *alone, *load)
    few = ("--max-kl", "10", "--calibrate", words, "--calibrate-tokens", "64", "-o", tmp_path / "none")
    assert "fits some rows of text and measures on others, and there are" in refused(2, llama, *few)
    too_long = ("--max-kl", "10", "--calibrate", words, "--machine", machine, "--prompt", "1000000")
    assert "describe a shorter load" in refused(2, llama, *too_long, "-o", tmp_path / "none")


def test_a_budget_that_cannot_be_kept(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate = ("--calibrate", words, "--calibrate-tokens", "4096")
    line = refused(4, llama, "--degree", "2", "-o", tmp_path / "out", *calibrate, "--max-kl", "1e-9")
    assert "no layer can change its form within the budget (KL at most 1e-09)" in line
    # The search keeps to the budget, but on unseen text the result does not.
    monkeypatch.setattr(Budget, "holds", lambda self, quality: False)
    line = refused(4, llama, "--degree", "2", "-o", tmp_path / "out", *calibrate, "--max-kl", "10")
    assert "the result does not keep to the budget (KL at most 10)" in line
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together(llama: Path, words: Path) -> None:
    calibrate = ("--calibrate", words)
    assert "needs --calibrate" in refused(2, llama, "--max-kl", "0.1")
    assert "leave --form and --layers out" in refused(2, llama, *calibrate, "--max-kl", "0.1", "--form", "ladder")
    assert "leave --form and --layers out" in refused(2, llama, *calibrate, "--max-kl", "0.1", "--layers", "1")
    assert "above 0" in refused(2, llama, *calibrate, "--max-kl", "-1")
    assert "give a share such as 2%" in refused(2, llama, *calibrate, "--max-ppl-increase", "two")
    assert share_of("2%") == share_of("0.02") == 0.02
    with pytest.raises(UsageError):
        share_of("%")
