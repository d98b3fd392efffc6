"""`kraken-verify`: repeats what the compile checked, and says what it could not check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kraken_compiler.cli.verify import app
from kraken_compiler.commands.compile import compile_model
from tests.cli_command import Command
from tests.once import CaptureOnce, RanksOnce
from tests.test_cli_compile import save_model
from tests.test_verify import emptied, rehash
from tests.zoo import SUPPORTED, token_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(scope="module", autouse=True)
def capture_once() -> Iterator[None]:
    """The model that most tests compare with is captured once."""
    with CaptureOnce().in_place():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer, `llama`, and its Kraken form for two ranks, `llama.kraken`."""
    place = tmp_path_factory.mktemp("verify")
    save_model("llama", place / "llama")
    compile_model(place / "llama", place / "llama.kraken", degree=2, form="kraken", verify=False)
    return place


@pytest.fixture
def artifact(place: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; it knows where the source is."""
    return Path(shutil.copytree(place / "llama.kraken", tmp_path / "llama.kraken"))


command = Command(app)
invoke, verified, refused = command.invoke, command.answer, command.refused


def set_source(artifact: Path, **changes: Any) -> None:
    """Rewrite what the manifest says of the source."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["source"].update(changes)
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def kinds(answer: dict[str, Any]) -> set[str]:
    return {entry["what"].split("(")[0].strip() for entry in answer["program"]["comparisons"]}


RANKS, SOURCE = "2 ranks against the lanes in one process", "standard form against the source"
CACHED = "2 ranks with a KV cache against the lanes without"
HALVES = "2 ranks that read tokens as two halves against the lanes"


@pytest.fixture(scope="module")
def repeated(place: Path) -> tuple[dict[str, Any], RanksOnce]:
    """What `--json` says of the artifact, and its ranks."""
    ranks = RanksOnce()
    with ranks.in_place():
        return verified(place / "llama.kraken"), ranks


@pytest.fixture
def known_ranks(repeated: tuple[dict[str, Any], RanksOnce]) -> Iterator[None]:
    """No rank is started."""
    with repeated[1].in_place():
        yield


def test_it_repeats_everything(repeated: tuple[dict[str, Any], RanksOnce]) -> None:
    answer, _ = repeated
    assert kinds(answer) == {RANKS, CACHED, HALVES, SOURCE}
    assert answer["program"]["max_rel_error"] < 1e-4
    assert answer["program"]["max_abs_error"] < 1e-2
    assert {"kl", "top1_agreement", "perplexity", "source_perplexity"} <= answer["quality"].keys()
    assert answer["quality"]["text"] == "the built-in sample"
    assert [bool(window["promised"]) for window in answer["schedule"]].count(True) == 2
    assert answer["skipped"] == []


@pytest.mark.usefixtures("known_ranks")
def test_for_people(place: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{index % 90 + 3}" for index in range(200)))
    result = invoke(place / "llama.kraken", "--text", tmp_path / "text", "--schedule")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(": ok, relative error") == 10
    assert "reduces in two halves, " in result.stdout
    assert "hidden, each behind at least" in result.stdout
    header, first, *_ = result.stdout.partition("\n\n")[2].splitlines()
    assert header.split() == ["reduce", "start", "matrix", "products", "and", "attentions", "wait"]
    assert first.split()[:2] == ["0", "all_reduce_start_default"]
    assert f"tokens of {tmp_path / 'text'}: KL to the source" in result.stdout
    assert "run on ranks: " in result.stderr
    assert "run on ranks: " not in result.stdout


@pytest.mark.usefixtures("known_ranks")
def test_a_source_that_is_gone_is_said(artifact: Path, place: Path, tmp_path: Path) -> None:
    set_source(artifact, path=str(tmp_path / "gone"))
    answer = verified(artifact)
    assert kinds(answer) == {RANKS, CACHED, HALVES}
    assert answer["quality"] is None
    assert answer["skipped"] == [
        f"no comparison with the source: it is not at '{tmp_path / 'gone'}'; name it with --source"
    ]
    (tmp_path / "text").write_text("w5 w6 w7")
    assert "name it with --source" in refused(2, artifact, "--text", tmp_path / "text")
    answer = verified(artifact, "--source", place / "llama")
    assert kinds(answer) == {RANKS, CACHED, HALVES, SOURCE}
    assert answer["quality"] is not None
    assert answer["skipped"] == []


@pytest.mark.usefixtures("known_ranks")
def test_a_source_in_memory_is_said(tmp_path: Path) -> None:
    model = SUPPORTED["plain_gpt"]()
    compile_model(
        model, tmp_path / "out", degree=2, verify=False, example_inputs={"input_ids": token_batch(model, 2, 16)}
    )
    answer = verified(tmp_path / "out")
    assert answer["skipped"] == [
        "no comparison with the source: it was a module in memory; name a file of it with --source"
    ]


@pytest.mark.usefixtures("known_ranks")
def test_another_source_is_refused(place: Path, tmp_path: Path) -> None:
    other = save_model("llama_bias", tmp_path / "other")
    line = refused(5, place / "llama.kraken", "--source", other)
    assert f"{other}: is not the model that {place / 'llama.kraken'} was compiled from (its hash differs)" in line
    line = refused(5, place / "llama.kraken", "--source", tmp_path / "absent")
    assert "absent" in line


@pytest.mark.usefixtures("known_ranks")
def test_a_pickled_source_needs_trust_again(tmp_path: Path) -> None:
    torch.save(SUPPORTED["plain_gpt"](), tmp_path / "model.pt")
    options: dict[str, Any] = {"trust_pickle": True, "input_specs": ["input_ids=int64[2,16]"], "verify": False}
    compile_model(tmp_path / "model.pt", tmp_path / "out", degree=2, **options)
    assert "--trust-pickle" in refused(5, tmp_path / "out")
    answer = verified(tmp_path / "out", "--trust-pickle")
    assert kinds(answer) == {RANKS, CACHED, HALVES, SOURCE}
    assert answer["quality"]["text"] == "random tokens (the model has no tokenizer)"


@pytest.mark.parametrize("name", ["lanes/lane-0.safetensors", "lanes/lane.json", "report.json"])
def test_a_tampered_file(artifact: Path, name: str) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    assert f"{name}: changed since it was written" in refused(5, artifact)


def test_what_is_no_artifact(artifact: Path, tmp_path: Path) -> None:
    assert "no artifact here" in refused(5, tmp_path / "nowhere")
    (artifact / "lanes" / "lane-1.safetensors").write_bytes(b"")
    assert "lane-1.safetensors: truncated" in refused(5, artifact)


def test_lost_overlap_fails(artifact: Path) -> None:
    from kraken_compiler.backends.lane_graph.graph_file import save_graph
    from kraken_compiler.capture import capture
    from kraken_compiler.passes.lower import lower

    program, _ = lower(capture(json.loads((artifact / "manifest.json").read_text())["source"]["path"]).program, 2)
    save_graph(emptied(program).graph, artifact / "lanes" / "lane.json")
    rehash(artifact)
    assert "lost their overlap" in refused(4, artifact)


@pytest.mark.usefixtures("known_ranks")
def test_wrong_numbers_fail(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kraken_compiler.verify.against_source.source_tolerance", lambda *_: -1.0)
    assert "the program computes something else: standard form against the source" in refused(4, place / "llama.kraken")


@pytest.mark.usefixtures("known_ranks")
def test_texts_that_cannot_be_read(place: Path, tmp_path: Path) -> None:
    assert "--text: cannot read" in refused(5, place / "llama.kraken", "--text", tmp_path / "absent")


@pytest.mark.usefixtures("known_ranks")
def test_costs_by_layer_and_their_plot(place: Path, artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    plot = tmp_path / "kl.png"
    found = verified(artifact, "--source", place / "llama", "--by-layer", "--plot", plot)
    costs = found["sensitivity"]["costs"]
    count = max(cost["last"] for cost in costs) + 1
    assert {(cost["first"], cost["last"]) for cost in costs} == {
        *((layer, layer) for layer in range(count)),
        *((layer, count - 1) for layer in range(count)),
    }
    whole = next(cost for cost in costs if (cost["first"], cost["last"]) == (0, count - 1))
    assert whole["kl"] == pytest.approx(found["quality"]["kl"], rel=1e-3), "the artifact's form is in all layers"
    assert len(found["quality"]["by_position"]["kl"]) > 16
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert Path(f"{artifact}.by-layer.json").exists()
    assert "kraken there alone" in invoke(artifact, "--by-layer").stdout
    several = verified(artifact, "--source", place / "llama", "--forms", "kraken,delayed", "--plot", plot)
    assert {cost["form"] for cost in several["sensitivity"]["costs"]} == {"kraken", "delayed"}
    assert "did you mean 'delayed'" in refused(2, artifact, "--forms", "delay")
    assert "--plot" in refused(2, artifact, "--plot", tmp_path / "kl.nonsense")
