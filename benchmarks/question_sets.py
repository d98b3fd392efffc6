"""Multiple-choice questions out of texts, in the format of `kraken-verify --choices`.

They need nothing but the texts: a word's definition among three others', the word that a text goes on with among three
other words of that text, and the words that follow a passage among those that follow other passages.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Question = dict[str, Any]

OTHERS = 3
CONTEXT_WORDS, CLOZE_WORDS, FOLLOWING_WORDS = 60, 30, 12
FROM_A_DOCUMENT = 6
PLAIN_WORD = re.compile(r"[a-z]{5,}")


def definitions(entries: Iterable[str], count: int) -> list[Question]:
    """Which definition is a word's; entries are `word: definition; "an example"`."""
    pairs = [tuple(entry.split("; ")[0].split(": ", 1)) for entry in entries]
    pairs = [(word, meaning) for word, meaning in pairs if PLAIN_WORD.fullmatch(word)]
    chance = random.Random(0)
    return [
        _question(chance, f'The word "{word}" means', meaning, [one[1] for one in chance.sample(pairs, OTHERS)])
        for word, meaning in pairs[:count]
    ]


def missing_words(documents: Sequence[str], count: int) -> list[Question]:
    """Which word of a document comes next; the others are words that stand elsewhere in it."""
    chance = random.Random(0)
    questions = []
    for document in documents:
        words = document.split()
        plain = sorted({word for word in words if PLAIN_WORD.fullmatch(word)})
        places = [place for place in range(CLOZE_WORDS, len(words)) if words[place] in plain]
        for place in chance.sample(places, min(FROM_A_DOCUMENT, len(places))):
            others = [word for word in plain if word != words[place]]
            if len(others) >= OTHERS:
                context = " ".join(words[:place])
                questions.append(_question(chance, context, words[place], chance.sample(others, OTHERS)))
    return chance.sample(questions, min(count, len(questions)))


def following_words(text: str, count: int) -> list[Question]:
    """Which words follow a passage; the others follow other passages of the text."""
    words = text.split()
    step = max(CONTEXT_WORDS + FOLLOWING_WORDS, len(words) // count)
    passages = [words[start : start + CONTEXT_WORDS + FOLLOWING_WORDS] for start in range(0, len(words) - step, step)]
    pairs = [(" ".join(words[:CONTEXT_WORDS]), " ".join(words[CONTEXT_WORDS:])) for words in passages]
    chance = random.Random(0)
    return [
        _question(chance, context, following, [one[1] for one in chance.sample(pairs, OTHERS)])
        for context, following in pairs[:count]
    ]


def write_questions(file: Path, questions: Sequence[Question]) -> None:
    """Write questions as JSON lines."""
    file.write_text("".join(f"{json.dumps(question)}\n" for question in questions))


def _question(chance: random.Random, context: str, right: str, others: Sequence[str]) -> Question:
    """A question with its choices in a random order; a second copy of the right one would make it two right ones."""
    choices = [f" {choice}" for choice in dict.fromkeys((right, *others))]
    chance.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(f" {right}")}
