"""`kraken-compile --auto`: the degree, overlap and forms of the least predicted time, and what it refuses."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.capture import capture
from kraken_compiler.commands import auto
from kraken_compiler.commands.auto import AutoChoice, DegreeTimes
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.errors import Rejection, UnsupportedModelError, UsageError
from kraken_compiler.ir.program import Program, Recognized, Split
from kraken_compiler.latency.forms import LoadTimes, seconds_of_forms
from kraken_compiler.latency.machine import load_machine
from kraken_compiler.latency.predict import Load, Predictor
from kraken_compiler.native import KrakenConfig, KrakenLM
from kraken_compiler.passes.compiler_pass import PassResult
from kraken_compiler.passes.lower import split_source
from kraken_compiler.passes.manager import PassRunner
from kraken_compiler.passes.recognize.find_layers import FindLayers
from kraken_compiler.passes.shard.plan_shards import PlanShards
from kraken_compiler.passes.stages import plan
from kraken_compiler.quality.budget import CHANGES, Candidate, Choice, Traffic
from tests.once import CaptureOnce
from tests.test_cli_compile import done, refused, save_model
from tests.test_latency import TOML
from tests.zoo import SUPPORTED

LOAD = ("--prompt", "32", "--new-tokens", "8")
REDUCES = "[[all_reduce]]\nsource = 'made up'\nranks = {}\nbytes = [100, 1e6]\nseconds = [{:g}, {:g}]\nbusy = [0, 0]\n"


def machine(path: Path, seconds: dict[int, float]) -> Path:
    """A machine whose small all-reduces take so long by ranks, and whose products take long."""
    tables = "".join(REDUCES.format(ranks, least, 10 * least) for ranks, least in seconds.items())
    slow = TOML.replace("rate = [[1e9, 2e9], [1e10, 2e10]]", "rate = [[1e8, 1e8], [1e8, 1e8]]")
    path.write_text(slow[: slow.index("[[all_reduce]]")] + tables)
    return path


@pytest.fixture(scope="module", autouse=True)
def capture_once() -> Iterator[None]:
    with CaptureOnce().in_place():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`four`: sums cost next to nothing; `two`: among four they cost a lot."""
    folder = tmp_path_factory.mktemp("machines")
    seconds = {"four": {2: 1e-7, 4: 1e-7}, "two": {2: 1e-7, 4: 1e-1}, "slow": {2: 1e-3, 4: 1e-3, 64: 1e-3}}
    return {name: machine(folder / f"{name}.toml", one) for name, one in seconds.items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = random.Random(0).choices(range(3, 97), k=9000)
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("\n".join(" ".join(f"w{word}" for word in chosen[at : at + 10]) for at in range(0, 9000, 10)))
    return path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes how often models are recognised and their shares are planned."""
    names: list[str] = []

    def noted(kind: type[Any]) -> None:
        run = kind.run

        def noting(step: Any, program: Program) -> PassResult:
            names.append(kind.__name__)
            result: PassResult = run(step, program)
            return result

        monkeypatch.setattr(kind, "run", noting)

    noted(FindLayers)
    noted(PlanShards)
    return names


def picked(*arguments: str | Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(done(*arguments, "--auto", *LOAD, "--json").stdout)
    return answer


@pytest.mark.parametrize(("name", "degree"), [("four", 4), ("two", 2)])
def test_the_degree_that_the_machine_makes_fastest(
    llama: Path, machines: dict[str, Path], ran: list[str], name: str, degree: int
) -> None:
    found = picked(llama, "--machine", machines[name], "--plan")
    said = found["auto"]
    assert said["degree"] == found["report"]["degree"] == degree
    assert found["report"]["exact"]
    seconds = {one["degree"]: one["seconds"] for one in said["degrees"]}
    assert list(seconds) == [2, 4]
    assert seconds[degree] == min(seconds.values())
    assert all(one["bound"] < one["seconds"] <= one["standard"] for one in said["degrees"])
    assert said["load"] == {"prompt": 32, "batch": 1, "new_tokens": 8}
    assert said["forms"] == ["standard"] * len(said["forms"])
    assert ran == ["FindLayers", "PlanShards", "PlanShards"]


def test_overlap_where_it_is_faster(llama: Path, machines: dict[str, Path]) -> None:
    """Halves of a prompt hide slow sums; where sums are fast they only cost launches."""
    slow = picked(llama, "--machine", machines["slow"], "--plan", "--degree", "2,4")["auto"]
    assert slow["overlap"] == "tokens"
    assert all(one["standard_halves"] < one["standard"] for one in slow["degrees"])
    assert picked(llama, "--machine", machines["four"], "--plan")["auto"]["overlap"] == "none"


def test_the_choice_in_one_line_and_only_among_the_degrees_that_are_named(
    llama: Path, machines: dict[str, Path], tmp_path: Path
) -> None:
    line = done(llama, "--auto", "--machine", machines["four"], "--plan", *LOAD, "--dump-graphs", tmp_path).stdout
    (choice,) = [one for one in line.splitlines() if one.startswith("picked")]
    assert re.search(
        r"degree 4, standard, prompts at once; .* 32 \+ 8 tokens on two of them, by degree: 2: .*, 4:", choice
    )
    assert list(tmp_path.glob("degree-2/*-split-branches.txt"))
    assert picked(llama, "--machine", machines["four"], "--plan", "--degree", "2")["auto"]["degree"] == 2


@pytest.fixture(scope="module")
def in_half(machines: dict[str, Path]) -> Path:
    """A machine whose figures are all for another element type than the model's."""
    path = machines["slow"].with_name("half.toml")
    path.write_text(machines["slow"].read_text().replace("float32", "bfloat16"))
    return path


ESTIMATED = "products in float32 are estimated from figures for bfloat16"


def test_what_a_machine_has_no_figures_for_is_noted(llama: Path, in_half: Path) -> None:
    assert ESTIMATED in " ".join(picked(llama, "--machine", in_half, "--plan")["report"]["notes"])


def test_an_artifact_of_what_was_picked(llama: Path, machines: dict[str, Path], tmp_path: Path) -> None:
    result = compile_model(
        llama,
        tmp_path / "out",
        auto=True,
        machine=str(machines["two"]),
        degree=[2, 4],
        prompt=32,
        new_tokens=8,
        verify=False,
    )
    assert isinstance(result.auto, AutoChoice)
    assert result.auto.degree == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["degree"] == 2
    assert set(manifest["forms"]) == {"standard"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["auto"] == result.auto.to_dict()


@pytest.mark.parametrize("name", ["slow", "two"])
def test_no_choice_of_forms_beats_the_bound(machines: dict[str, Path], name: str) -> None:
    split = split_source(capture(SUPPORTED["llama"]()).program, 2)
    predictor, load = Predictor(load_machine(str(machines[name]))), Load(32, 1, 8)
    times, seconds_of = LoadTimes.of(split, predictor, load), seconds_of_forms(split, predictor, load)
    layers = len(split.layers.layers)
    choices = [(form,) * layers for form in CHANGES]
    choices += random.Random(0).sample(list(itertools.product(("standard", *CHANGES), repeat=layers)), 4)
    assert all(times.bound < seconds_of(forms) for forms in choices)
    assert seconds_of(("standard",) * layers) == times.fastest
    assert seconds_of_forms(split, predictor, load, overlap="none")(("standard",) * layers) == times.at_once


def within(llama: Path, words: Path, target: Path, machine: Path, *options: str) -> dict[str, Any]:
    return picked(llama, "--machine", machine, "-o", target, *calibrated(words), *options)


def calibrated(words: Path) -> tuple[str | Path, ...]:
    return "--calibrate", words, "--calibrate-tokens", "4096", "--calibrate-passes", "0", "--no-verify"


@pytest.mark.slow
def test_what_a_search_had_to_estimate_is_noted(llama: Path, words: Path, in_half: Path, tmp_path: Path) -> None:
    budget = ("--degree", "2", "--machine", in_half, "--max-kl", "10", *LOAD)
    assert ESTIMATED in done(llama, *budget, *calibrated(words), "-o", tmp_path / "out").stdout


@pytest.mark.slow
def test_within_a_budget_degrees_that_cannot_be_faster_are_not_searched(
    llama: Path, words: Path, machines: dict[str, Path], tmp_path: Path, ran: list[str]
) -> None:
    found = within(llama, words, tmp_path / "out", machines["four"], "--max-kl", "10")
    said = found["auto"]
    two, four = said["degrees"]
    assert said["degree"] == 4
    assert four["choice"] is not None
    assert two["choice"] is None
    assert four["seconds"] <= two["bound"]
    assert ran == ["FindLayers", "PlanShards", "PlanShards"]


@pytest.mark.slow
def test_within_a_budget_the_best_of_all_that_was_searched(
    llama: Path, words: Path, machines: dict[str, Path], tmp_path: Path, ran: list[str]
) -> None:
    found = within(llama, words, tmp_path / "out", machines["slow"], "--max-kl", "10", "--degree", "2,4")
    said, choice = found["auto"], found["choice"]
    assert [one["choice"] is not None for one in said["degrees"]] == [True, True]
    best = min(said["degrees"], key=lambda one: one["seconds"])
    assert said["degree"] == best["degree"]
    assert choice == best["choice"]
    assert said["forms"] == choice["best"]["forms"]
    assert best["seconds"] < best["standard"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["degree"], manifest["forms"]) == (said["degree"], said["forms"])
    assert ran == ["FindLayers", "PlanShards", "PlanShards"]
    costs = json.loads((tmp_path / "out.sensitivity.json").read_text())
    assert costs["degree"] == said["degree"]


@pytest.mark.slow
def test_where_nothing_is_within_the_budget_all_stays_standard(
    llama: Path, words: Path, machines: dict[str, Path], tmp_path: Path
) -> None:
    found = within(llama, words, tmp_path / "out", machines["slow"], "--max-kl", "1e-9", "--degree", "2")
    assert found["auto"]["forms"] == ["standard"] * len(found["auto"]["forms"])
    assert found["choice"]["best"] is None
    assert found["calibration"] is None
    assert found["report"]["exact"]


def test_what_does_not_go_with_it(llama: Path, machines: dict[str, Path], words: Path) -> None:
    four = ("--auto", "--machine", machines["four"])
    assert "--auto needs a --machine" in refused(2, llama, "--auto")
    assert "--form: --auto chooses forms" in refused(2, llama, *four, "--form", "standard")
    assert "--layers: --auto chooses forms" in refused(2, llama, *four, "--layers", "1")
    assert "--overlap: --auto chooses forms and overlap" in refused(2, llama, *four, "--overlap", "tokens")
    assert "--auto changes no form" in refused(2, llama, *four, "--calibrate", words)
    assert "which --plan does not" in refused(2, llama, *four, "--plan", "--max-kl", "1")
    assert "no all-reduce among 8 ranks" in refused(2, llama, *four, *LOAD, "--plan", "--degree", "2,8")
    assert "valid degrees: 1 to" in refused(2, llama, *four, *LOAD, "--plan", "--degree", "64")
    assert "describe a shorter load" in refused(2, llama, *four, "--plan", "--prompt", "1000000")
    budget = ("--machine", machines["four"], "--max-kl", "1", "--calibrate", words)
    assert "chosen from: --auto" in refused(2, llama, *budget, "--degree", "2,4")


def test_a_text_that_nothing_would_read_is_refused(llama: Path, words: Path, tmp_path: Path) -> None:
    """It went unopened: a file that is not there was accepted without a word."""
    absent, out = tmp_path / "absent.txt", ("-o", tmp_path / "out")
    assert "--text: --no-verify measures no quality" in refused(2, llama, "--no-verify", "--text", absent, *out)
    tokens = refused(2, llama, "--no-verify", "--text-tokens", "9", *out)
    assert "--text-tokens: --no-verify measures no quality" in tokens
    assert "--text: --plan runs no model" in refused(2, llama, "--plan", "--text", words)
    # What is calibrated is measured all the same.
    read = refused(5, llama, "--no-verify", "--calibrate", words, "--text", absent, "--degree", "2", *out)
    assert str(absent) in read


def test_degrees_that_cannot_be_had_are_left_out_unless_they_are_named(
    llama: Path, machines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(recognized: Recognized, degree: int, runner: PassRunner | None = None) -> Split:
        if degree == 4:
            raise UnsupportedModelError([Rejection("made up")])
        return plan(recognized, degree, runner)

    monkeypatch.setattr(auto, "plan", refusing)
    found = picked(llama, "--machine", machines["four"], "--plan")["auto"]
    assert (found["degree"], found["left_out"]) == (2, {"4": "made up"})
    assert "made up" in refused(3, llama, "--auto", "--machine", machines["four"], "--plan", *LOAD, "--degree", "2,4")


def test_a_kraken_model_has_its_degree(machines: dict[str, Path]) -> None:
    config = KrakenConfig(layers=2, width=16, heads=1, degree=2, vocabulary=64, context=64)
    with pytest.raises(UsageError, match="--auto: a Kraken model runs in the form that it was trained in"):
        compile_model(KrakenLM(config).eval(), None, auto=True, machine=str(machines["four"]))


def test_a_choice_that_is_slower_than_standard_is_not_taken() -> None:
    slow = Candidate(("kraken",), Traffic(2, 1, 1), 0.1, 0.01, 0.5, seconds=2.0)
    times = DegreeTimes(2, LoadTimes(1.5, 1.0, 0.5), Choice("KL at most 1", slow, (slow,), 1.0))
    found = AutoChoice("here", Load(8), 2, ("standard",), True, True, (times,))
    assert times.seconds == 1.0
    assert found.choice == Choice("KL at most 1", None, (slow,), 1.0)
    assert found.lines()[0].startswith("picked      degree 2, standard, prompts in two halves;")


def test_a_machine_of_other_degrees_than_the_models(llama: Path, tmp_path: Path) -> None:
    large = machine(tmp_path / "large.toml", {64: 1e-5})
    line = refused(2, llama, "--auto", "--machine", large, "--plan", *LOAD)
    assert "has all-reduces for 64 ranks, and the model can be divided among 1 to 8 lanes" in line
