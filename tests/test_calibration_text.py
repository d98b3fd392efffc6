"""Calibration from text files: which rows are fitted, held back and unseen, and the command that does it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kraken_compiler.capture import capture
from kraken_compiler.errors import UsageError
from kraken_compiler.quality.calibration.rows import calibration_text, divide
from tests.test_cli_compile import done, refused, save_model

pytestmark = pytest.mark.slow


def rows(text: int, count: int) -> list[list[int]]:
    """Rows that say which text they are of and where."""
    return [[text, place, 0] for place in range(count)]


def numbers(batches: tuple[torch.Tensor, ...]) -> set[tuple[int, int]]:
    """(text, place) of every row."""
    return {(int(row[0]), int(row[1])) for batch in batches for row in batch}


def test_strengths_are_chosen_on_texts_of_their_own() -> None:
    found = divide([rows(text, 10) for text in range(5)], count=30, singles=False)
    fitted, held, unseen = numbers(found.fitted), numbers(found.held_out), numbers(found.unseen)
    assert {text for text, _ in held} == {2}
    assert 2 not in {text for text, _ in fitted}
    assert len(fitted) + len(held) == 30 == found.tokens // 3
    watched = numbers((found.watched,))
    assert len(watched) == 3
    assert not unseen & (fitted | held | watched)
    assert not watched & (fitted | held)


def test_some_rows_are_cut_into_single_tokens_for_more_first_ones() -> None:
    texts = [[[text] * 16 for _ in range(40)] for text in range(4)]
    found = divide(texts, count=100)
    assert [tuple(ids.shape) for ids in found.fitted] == [(8, 16)] * 8 + [(2, 16), (128, 1), (16, 1)]
    assert {ids.shape[1] for ids in found.held_out} == {16, 1}
    assert {ids.shape[1] for ids in found.unseen} == {16}
    assert found.tokens == 1600
    whole = divide(texts, count=100, singles=False)
    assert {ids.shape[1] for ids in (*whole.fitted, *whole.held_out)} == {16}


def test_a_single_text_holds_back_its_end() -> None:
    found = divide([rows(0, 24)], count=100, singles=False)
    fitted, held, unseen = numbers(found.fitted), numbers(found.held_out), numbers(found.unseen)
    (watched,) = numbers((found.watched,))
    assert max(fitted) < min(held) < max(held) < watched < min(unseen)
    assert len(fitted) + len(held) + 1 + len(unseen) == 24


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UsageError, match="the text has 2 rows of tokens, at least 3 are needed"):
        divide([rows(0, 1), rows(1, 1)], count=5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four texts of a few thousand words each."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        chosen = random.Random(number).choices(range(3, 97), k=4000)
        lines = [" ".join(f"w{word}" for word in chosen[at : at + 10]) for at in range(0, 4000, 10)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def test_rows_are_spread_over_all_texts(llama: Path, texts: Path) -> None:
    captured = capture(llama)
    found = calibration_text(captured, [texts], 64 * 40)
    assert found.tokens == 64 * 40
    assert {batch.shape[1] for batch in (*found.fitted, *found.held_out)} == {64, 1}
    assert {batch.shape[1] for batch in found.unseen} == {64}
    assert sum(batch.numel() for batch in found.held_out) == 64 * 10, "one text of four"
    again = calibration_text(captured, [texts], 64 * 40)
    assert all(map(torch.equal, found.fitted, again.fitted))
    everything = calibration_text(captured, [texts / "0.txt"], 10**6)
    assert 50 < everything.tokens // 64 < 4000 // 64


def test_token_files_serve_models_without_a_tokenizer(tmp_path: Path) -> None:
    model = save_model("gpt2", tmp_path / "gpt2", tokenizer=False)
    ids = np.random.default_rng(0).integers(0, 96, (60, 24))
    np.save(tmp_path / "documents.npy", ids)
    np.save(tmp_path / "stream.npy", ids.reshape(-1))
    captured = capture(model)
    # Documents are shorter than the rows that the model takes: no row reaches over two of them.
    found = calibration_text(captured, [tmp_path / "documents.npy"], 24 * 40)
    documents = {tuple(row) for row in ids.tolist()}
    assert {tuple(row) for batch in found.unseen for row in batch.tolist()} < documents
    assert found.tokens == 24 * 40
    assert calibration_text(captured, [tmp_path / "stream.npy"], 24 * 40).unseen[0].shape[1] > 24
    target, text = tmp_path / "out", ("--text", tmp_path / "documents.npy", "--text-tokens", "240")
    calibrate = ("--calibrate", tmp_path / "documents.npy", "--calibrate-tokens", "960")
    result = json.loads(done(model, "--degree", "2", "-o", target, *calibrate, *text, "--json").stdout)
    unseen, other = result["calibration"]["quality"]
    assert unseen["after"]["kl"] < unseen["before"]["kl"]
    assert other["after"]["text"] == str(tmp_path / "documents.npy")
    assert other["after"]["tokens"] == 240


def test_a_compile_that_calibrates(llama: Path, texts: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    calibrate = ("--calibrate", texts / "0.txt", "--calibrate", texts / "1.txt", "--calibrate-tokens", "4096")
    backends = ("--backend", "torch,onnx")
    result = json.loads(done(llama, "--degree", "2", "-o", target, *backends, *calibrate, "--json").stdout)
    found = result["calibration"]
    assert found["tokens"] == 4096
    unseen, sample = found["quality"]
    assert unseen["after"]["kl"] < unseen["before"]["kl"]
    assert unseen["before"]["text"] == "unseen parts of the calibration text"
    # What ranks and lanes compute was compared, and the form was measured with the weights that were written.
    measured = result["verification"]
    compared = " ".join(entry["what"] for entry in measured["program"]["comparisons"])
    assert "ranks" in compared
    assert "devices" in compared
    assert measured["quality"]["kl"] == pytest.approx(sample["after"]["kl"], rel=1e-3)
    assert json.loads((target / "report.json").read_text())["calibration"]["branches"]


def test_refusals(llama: Path, texts: Path, tmp_path: Path) -> None:
    def line(*arguments: str | Path) -> str:
        return refused(2, llama, "--degree", "2", "-o", tmp_path / "out", "--no-verify", *arguments)

    (tmp_path / "short").write_text("w3 w4")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "has 0 rows of tokens, at least 3" in line("--calibrate", tmp_path / "short")
    with pytest.raises(UsageError, match="has no tokenizer"):
        calibration_text(capture(save_model("gpt2", tmp_path / "gpt2", tokenizer=False)), [texts], 100)
    bad = (llama, "--degree", "2", "-o", tmp_path / "out", "--no-verify", "--calibrate")
    assert "is not UTF-8 text" in refused(5, *bad, tmp_path / "bytes")
    assert "cannot read" in refused(5, *bad, tmp_path / "missing")
    np.save(tmp_path / "single.npy", np.ones((20, 1), dtype=np.int64))
    assert "holds [20, 1] tokens; nothing follows from a single one" in refused(5, *bad, tmp_path / "single.npy")
    np.save(tmp_path / "large.npy", np.full(50, 97))
    assert "holds ids from 97 to 97; the model knows 0 to 96" in refused(5, *bad, tmp_path / "large.npy")
