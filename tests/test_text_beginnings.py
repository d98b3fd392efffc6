"""Tokenizers that begin every text with a special token: so does every row that is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from kraken_compiler.capture import Capture, capture
from kraken_compiler.errors import UsageError
from kraken_compiler.quality.calibration.rows import calibration_text
from kraken_compiler.quality.healing.data import read_texts
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.texts.read import TextChoice, beginning_of_text, evaluation_text, load_tokenizer
from kraken_compiler.training.from_scratch.settings import TrainSettings
from kraken_compiler.training.rows import read_rows
from tests.test_cli_compile import save_model, save_tokenizer

BEGIN, END = 1, 2
ROW = 64


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    path = save_model("llama", tmp_path_factory.mktemp("source") / "llama", tokenizer=False)
    save_tokenizer(path, template="<s> $A </s>")
    return capture(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 words in lines of ten."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(f"w{(line * 10 + word) % 90 + 3}" for word in range(10)) for line in range(500)))
    return path


@pytest.mark.parametrize(
    ("template", "begin"), [("$A", []), ("<s> $A", [BEGIN]), ("<s> $A </s>", [BEGIN]), ("$A </s>", [])]
)
def test_what_a_text_begins_with(template: str, begin: list[int], tmp_path: Path) -> None:
    path = save_model("llama", tmp_path / "llama", tokenizer=False)
    save_tokenizer(path, template=template)
    assert beginning_of_text(load_tokenizer(capture(path), "--text")) == begin


def test_rows_to_measure_on(captured: Capture, text: Path) -> None:
    tokens = evaluation_text(captured, TextChoice(text))
    assert not isinstance(tokens, str)
    rows = [row for batch in tokens for row in batch.tolist()]
    assert {len(row) for row in rows} == {ROW}
    assert {row[0] for row in rows} == {BEGIN}
    words = [word for row in rows for word in row[1:]]
    assert words == [at % 90 + 3 for at in range(len(words))], "nothing is left out between rows, nothing is added"
    assert len(words) > 5000 - ROW


def test_a_limit_counts_all_tokens_of_rows(captured: Capture, text: Path) -> None:
    tokens = evaluation_text(captured, TextChoice(text, limit=3 * ROW))
    assert sum(batch.numel() for batch in tokens) == 3 * ROW
    tokens = evaluation_text(captured, TextChoice(text, limit=2))
    assert [batch.tolist() for batch in tokens] == [[[BEGIN, 3]]]


def test_a_limit_that_leaves_room_for_nothing_but_the_beginning(text: Path, tmp_path: Path) -> None:
    path = save_model("llama", tmp_path / "llama", tokenizer=False)
    save_tokenizer(path, template="<s> <s> <s> $A")
    tokens = evaluation_text(capture(path), TextChoice(text, limit=2))
    with pytest.raises(UsageError, match="is too short to measure anything on"):
        list(tokens)


def test_rows_to_calibrate_on(captured: Capture, text: Path) -> None:
    found = calibration_text(captured, [text], 20 * ROW)
    rows = [row for batch in (*found.batches, found.watched, *found.unseen) for row in batch.tolist()]
    assert {len(row) for row in rows} == {ROW}, "no single tokens: nothing but the beginning is ever the first one"
    assert {row[0] for row in rows} == {BEGIN}
    assert all(BEGIN not in row[1:] and END not in row for row in rows)


def test_rows_to_heal_on(captured: Capture, text: Path) -> None:
    found = read_texts(captured, [text], [], HealSettings(steps=1, sequence=32))
    for rows in (found.train, found.held_out):
        assert rows.shape[1] == 32
        assert set(rows[:, 0].tolist()) == {BEGIN}
        assert not (rows[:, 1:] <= END).any()


def test_rows_to_train_on_from_scratch(captured: Capture, text: Path) -> None:
    settings = TrainSettings(steps=1, sequence=32)
    tokenizer = load_tokenizer(captured, "--text")
    found = read_rows([text, text], [], tokenizer, 97, 32, settings, joined=True)
    special = [token for token in found.train.flatten().tolist() if token <= END]
    assert special[:3] == [BEGIN, END, BEGIN], "texts follow one another"
