"""Answers multiple-choice questions with a rewritten model and with its source: KL says little to most people.

A question is a context and some continuations of it, of which one is right. A model's answer is the continuation with
the highest log-probability per byte, what lm-evaluation-harness calls `acc_norm`; its own code finds the probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kraken_compiler.capture import Capture
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.lanes.logits import LogitsOf, is_causal
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.progress import Advance
from kraken_compiler.texts.read import load_tokenizer, longest_row, read_text, require_one_text, token_ids

if TYPE_CHECKING:
    from kraken_compiler.quality.harness import HarnessModel

OPTION = "--choices"
_LONGEST = 1024
_QUESTIONS_AT_ONCE, _ROWS_AT_ONCE = 32, 4


class Question(BaseModel):
    """A line of a file of questions.

    Attributes:
        context: What the models read first.
        choices: Its continuations, with the blank that they may begin with.
        answer: Which of them is right, from 0 on.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    context: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_complete(self) -> Question:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices")
        if not self.context.strip():
            raise ValueError("the context is blank")
        if not all(self.choices):
            raise ValueError("a choice is empty")
        return self


@dataclass(frozen=True)
class Accuracy:
    """How often two models answer questions rightly.

    Attributes:
        name: The file of the questions.
        questions: How many there are.
        accuracy: Share that the rewritten model answers rightly.
        source_accuracy: Share that its source does.
        agreement: Share to which both give the same answer.
        chance: Share that random answers would get right.
    """

    name: str
    questions: int
    accuracy: float
    source_accuracy: float
    agreement: float
    chance: float

    @property
    def error(self) -> float:
        """Standard error of the accuracy, as of independent questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}

    def line(self) -> str:
        """The measurement as a line for people."""
        return (
            f"{self.questions:,} questions of {self.name}: {self.accuracy:.1%} +- {self.error:.1%} right "
            f"(source {self.source_accuracy:.1%}, chance {self.chance:.1%}), same answer {self.agreement:.1%}"
        )


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions, a JSON object a line: `{"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}`.

    Raises:
        InputFileError: The file cannot be read, or a line is no question; names the line.
    """
    questions = []
    for number, line in enumerate(read_text(path, OPTION).splitlines(), 1):
        if not line.strip():
            continue
        try:
            questions.append(Question.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = f"{where}: {first['msg']}" if where else first["msg"]
            raise InputFileError(f"{OPTION}: {path}, line {number}: {message}") from error
    if not questions:
        raise InputFileError(f"{OPTION}: {path} has no questions")
    return questions


def measure_accuracy(
    captured: Capture,
    questions: Sequence[Question],
    name: str,
    source: LogitsOf,
    rewritten: LogitsOf,
    *,
    advance: Advance | None = None,
) -> Accuracy:
    """Answer questions with two models.

    Args:
        captured: The source model, which must be causal and have a tokenizer.
        questions: The questions.
        name: Where they are from, for the record.
        source, rewritten: The two models.
        advance: Is told how many questions are answered.

    Raises:
        UsageError: The model reads no text or is not causal, or lm-evaluation-harness is not installed.
    """
    require_one_text(captured.program, OPTION)
    # Imported late, since the harness is an extra.
    from kraken_compiler.quality.harness import HarnessModel

    tokenizer = load_tokenizer(captured, OPTION, "it cannot read questions")
    text = "".join((questions[0].context, questions[0].choices[0]))
    ids = token_ids(tokenizer, text, vocabulary(captured.program), OPTION)
    longest = longest_row(captured, _LONGEST)
    if min(len(ids), longest) < 2 or not is_causal(source, torch.tensor([ids[:longest]])):
        raise UsageError(f"{OPTION}: the model reads what follows a token, too; it does not continue texts")
    models = [HarnessModel(logits_of, tokenizer, longest, _ROWS_AT_ONCE) for logits_of in (source, rewritten)]
    source_answers: list[int] = []
    answers: list[int] = []
    for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
        some = questions[start : start + _QUESTIONS_AT_ONCE]
        for into, model in zip((source_answers, answers), models, strict=True):
            into += _answers(model, some)
        if advance is not None:
            advance(len(answers), len(questions), "questions")
    wanted = [question.answer for question in questions]
    return Accuracy(
        name=name,
        questions=len(questions),
        accuracy=_share_alike(answers, wanted),
        source_accuracy=_share_alike(source_answers, wanted),
        agreement=_share_alike(answers, source_answers),
        chance=sum(1 / len(question.choices) for question in questions) / len(questions),
    )


def _answers(model: HarnessModel, questions: Sequence[Question]) -> list[int]:
    """The continuation of every question that has the highest log-probability per byte."""
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    scores = iter(model.log_probabilities(pairs))
    per_byte = [[next(scores) / len(choice.encode()) for choice in question.choices] for question in questions]
    return [values.index(max(values)) for values in per_byte]


def _share_alike(answers: Sequence[int], others: Sequence[int]) -> float:
    return sum(answer == other for answer, other in zip(answers, others, strict=True)) / len(answers)
