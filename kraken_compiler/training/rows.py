"""The rows of tokens that are trained and evaluated on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.texts.read import beginning_of_text, beginning_with, read_text, token_ids
from kraken_compiler.texts.token_files import TokenIds, read_token_file, spread, token_rows
from kraken_compiler.training.settings import RunSettings

_MOST_NAMES = 3


@dataclass(frozen=True)
class TrainingText:
    """Rows of token ids, int64 [rows, sequence].

    Attributes:
        train: What is trained on.
        held_out: What is not; the last part of every file.
        hashes: sha256 of every file that gave rows, by its name.
        notes: What people should know of the rows.
    """

    train: Tensor
    held_out: Tensor
    hashes: dict[str, str]
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """sha256 of all token ids: other texts have another one, and so has another tokenizer."""
        return hashlib.sha256(self.train.numpy().tobytes() + self.held_out.numpy().tobytes()).hexdigest()


def read_rows(
    texts: Sequence[Path],
    tokens: Sequence[Path],
    tokenizer: Any,
    vocabulary: int,
    longest: int,
    settings: RunSettings,
    *,
    joined: bool = False,
) -> TrainingText:
    """Read files of text and of token ids.

    Args:
        texts: UTF-8 files.
        tokens: Files of token ids, see `read_token_file`.
        tokenizer: Reads the texts; None if there are none.
        vocabulary: How many tokens the model has.
        longest: Most tokens of a row that the model takes.
        settings: Say how long a row is and how much is held out.
        joined: Texts follow one another, with the tokenizer's end of a text between; else no row holds parts of two.

    Raises:
        UsageError: There is too little of it.
        InputFileError: A file cannot be read, or its tokens are not the model's.
    """
    streams = [read_token_file(path, vocabulary, "--tokens") for path in tokens]
    # A row of a token file is a document, which may be short.
    length = min([longest, settings.sequence, *(ids.shape[1] for ids in streams if ids.ndim == 2)])
    if length < 2:
        raise UsageError("rows of one token have no next one: --sequence and the model's context must be at least 2")
    begin = beginning_of_text(tokenizer) if texts else []
    documents = [_split_text(tokenizer, path, settings.hold_out, vocabulary) for path in texts]
    if joined and documents:
        documents, begin = [_joined(documents, begin, tokenizer.eos_token_id)], []
    parts = [_split_tokens(ids, settings.hold_out) for ids in streams]
    own = max(1, length - len(begin))
    row_pairs = [
        *(tuple(beginning_with(begin, token_rows(ids, own)) for ids in part) for part in documents),
        *(tuple(token_rows(ids, length) for ids in part) for part in parts),
    ]
    rows, held_out = (torch.cat(side) for side in zip(*row_pairs, strict=True))
    if not len(rows) or not len(held_out):
        count = sum(ids.size for part in (*documents, *parts) for ids in part)
        raise UsageError(
            f"the texts are too short: {count:,} tokens give {len(rows)} rows of {length} to train on and "
            f"{len(held_out)} held out; both need one (a smaller --sequence makes shorter rows, a larger --hold-out "
            "holds out more)"
        )
    files = [*texts, *tokens]
    short = [] if joined else [path for path, pair in zip(files, row_pairs, strict=True) if not len(pair[0])]
    notes = []
    if length < settings.sequence:
        notes.append(f"rows have {length} tokens, not {settings.sequence}: the model or the files have no longer ones")
    if short:
        names = ", ".join(path.name for path in short[:_MOST_NAMES]) + (", ..." if len(short) > _MOST_NAMES else "")
        notes.append(f"{len(short)} of {len(files)} texts have no row of {length} tokens and are left out: {names}")
    evaluated = spread(held_out, max(1, settings.evaluate_tokens // length))
    return TrainingText(rows, evaluated, _hashes(*(path for path in files if path not in short)), tuple(notes))


def parts_of_text(path: Path, hold_out: float) -> tuple[str, str]:
    """A text's beginning and its end, which is held out, cut where a line ends.

    Raises:
        InputFileError: It cannot be read.
    """
    text = read_text(path, "--text")
    end = round(len(text) * (1 - hold_out))
    # Where no line ends soon, within a line: not all of the end may go.
    cut = text.find("\n", end, end + (len(text) - end) // 2) + 1 or end
    return text[:cut], text[cut:]


def _split_text(tokenizer: Any, path: Path, hold_out: float, vocabulary: int) -> tuple[TokenIds, TokenIds]:
    train, held_out = (
        np.array(token_ids(tokenizer, part, vocabulary, "--text", special=False), np.int64)
        for part in parts_of_text(path, hold_out)
    )
    return train, held_out


def _joined(
    documents: Sequence[tuple[TokenIds, TokenIds]], begin: list[int], end: int | None
) -> tuple[TokenIds, TokenIds]:
    """The beginnings of all texts one after the other, and the ends that are held out."""
    before, after = np.array(begin, np.int64), np.array([] if end is None else [end], np.int64)
    train, held_out = (
        np.concatenate([piece for part in documents for piece in (before, part[side], after)]) for side in (0, 1)
    )
    return train, held_out


def _split_tokens(ids: TokenIds, hold_out: float) -> tuple[TokenIds, TokenIds]:
    cut = round(len(ids) * (1 - hold_out))
    return ids[:cut], ids[cut:]


def _hashes(*paths: Path) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        # What a manifest holds is text, and a name may be any bytes.
        name, folder = (os.fsencode(part).decode("utf-8", "backslashreplace") for part in (path.name, path.parent.name))
        while name in hashes:
            name = f"{folder}/{name}"
        with path.open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
