"""Multiple-choice questions: what a file of them may hold, and whose answers are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kraken_compiler.capture import capture
from kraken_compiler.commands.compile import compile_model
from kraken_compiler.commands.verify import verify_artifact
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.lanes.logits import LogitsOf
from kraken_compiler.quality.multiple_choice import Question, measure_accuracy, read_questions
from tests.test_cli_compile import save_model

GOOD = {"context": "w5 w6", "choices": [" w7", " w8 w9"], "answer": 1}


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_a_line_is_a_question(tmp_path: Path) -> None:
    first, second = read_questions(write(tmp_path, GOOD, "", {**GOOD, "answer": 0}))
    assert first == Question(context="w5 w6", choices=[" w7", " w8 w9"], answer=1)
    assert second.answer == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no questions"),
        ([GOOD, "{"], "line 2: Invalid JSON"),
        ([{**GOOD, "answer": 2}], "line 1: Value error, answer 2 of 2 choices"),
        ([{**GOOD, "answer": True}], "line 1: answer: Input should be a valid integer"),
        ([{**GOOD, "choices": [" w7"]}], "line 1: choices: List should have at least 2 items"),
        ([{**GOOD, "choices": ["", " w7"]}], "line 1: Value error, a choice is empty"),
        ([{**GOOD, "context": " \n"}], "line 1: Value error, the context is blank"),
        ([{**GOOD, "context": ""}], "line 1: context: String should have at least 1 character"),
        ([{"context": "w5", "choices": [" w7", " w8"]}], "line 1: answer: Field required"),
        ([{**GOOD, "question": "?"}], "line 1: question: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_question_is_refused_by_its_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(InputFileError, match=message):
        read_questions(write(tmp_path, *lines))


def likes(wanted: int, size: int) -> LogitsOf:
    """A model to which one token is likely wherever it stands."""

    def logits_of(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, size)
        logits[..., wanted] = 5.0
        return logits

    return logits_of


def test_both_models_answer(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    captured = capture(save_model("llama", tmp_path / "llama"))
    assert captured.origin.tokenizer is not None
    tokenizer = captured.origin.tokenizer.load()
    seven, eight = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (" w7", " w8"))
    size = int(captured.config["vocab_size"]) if captured.config else 0
    choices = [" w7", " w8", " w9", " w10"]
    questions = [Question(context="w5 w6", choices=choices, answer=answer) for answer in (0, 0, 1)]
    found = measure_accuracy(captured, questions, "questions", likes(seven, size), likes(eight, size))
    assert (found.questions, found.chance) == (3, 0.25)
    assert (found.source_accuracy, found.accuracy, found.agreement) == (2 / 3, 1 / 3, 0.0)
    assert found.error == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    assert "3 questions of questions: 33.3% +- 27.2% right (source 66.7%, chance 25.0%)" in found.line()


def test_of_long_and_short_choices_bytes_decide(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    captured = capture(save_model("llama", tmp_path / "llama"))
    size = int(captured.config["vocab_size"]) if captured.config else 0
    uniform: LogitsOf = lambda ids: torch.zeros(*ids.shape, size)  # noqa: E731
    # Every token is as likely: one of three bytes says less for a byte than two of eight.
    question = Question(context="w5", choices=[" w7", " w70 w71"], answer=1)
    assert measure_accuracy(captured, [question], "bytes", uniform, uniform).accuracy == 1.0


def test_a_model_that_reads_what_follows_has_no_answers(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    captured = capture(save_model("llama", tmp_path / "llama"))
    size = int(captured.config["vocab_size"]) if captured.config else 0

    def reads_all(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids.sum(1, keepdim=True) % size, size).float().expand(-1, ids.shape[1], -1)

    with pytest.raises(UsageError, match="does not continue texts"):
        measure_accuracy(captured, [Question(**GOOD)], "some", reads_all, reads_all)


@pytest.mark.slow
def test_an_artifact_and_its_source_answer(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    model = save_model("llama", tmp_path / "llama")
    compile_model(model, tmp_path / "standard", degree=2, form="standard", verify=False)
    file = write(tmp_path, *({**GOOD, "context": f"w{word} w{word + 1}"} for word in range(5, 25)))
    result = verify_artifact(tmp_path / "standard", choices=[file])
    (found,) = result.accuracies
    assert (found.questions, found.agreement) == (20, 1.0)
    assert found.accuracy == found.source_accuracy
    assert f"choices   {found.line()}" in result.lines()
    assert result.to_dict()["multiple_choice"][0]["name"] == file.name
