"""The tokens that a model is trained and evaluated on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kraken_compiler.capture import Capture
from kraken_compiler.errors import UsageError
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.quality.texts import load_tokenizer, longest_row, read_text, require_one_text, token_ids
from kraken_compiler.quality.token_files import TokenIds, read_token_file, spread


@dataclass(frozen=True)
class HealingText:
    """Rows of token ids, int64 [rows, sequence].

    Attributes:
        train: What is trained on.
        held_out: What is not; the last part of every file.
        hashes: sha256 of every file, by its name.
    """

    train: Tensor
    held_out: Tensor
    hashes: dict[str, str]


def read_texts(captured: Capture, texts: Sequence[Path], tokens: Sequence[Path], settings: HealSettings) -> HealingText:
    """Read files of text and of token ids.

    Args:
        captured: The source model; its tokenizer reads the texts.
        texts: UTF-8 files.
        tokens: Files of token ids, see `read_token_file`.
        settings: Say how long a row is and how much is held out.

    Raises:
        UsageError: There is nothing to read or too little of it, or the model reads no text.
        InputFileError: A file cannot be read, or its tokens are not the model's.
    """
    if not texts and not tokens:
        raise UsageError("name a text to heal on: --text FILE, or --tokens FILE for a model without a tokenizer")
    require_one_text(captured.program, "a model is healed on text")
    streams = [read_token_file(path, vocabulary(captured.program), "--tokens") for path in tokens]
    # A row of a token file is a document, which may be short.
    length = min([longest_row(captured, settings.sequence), *(ids.shape[1] for ids in streams if ids.ndim == 2)])
    tokenizer = load_tokenizer(captured, "--text", "give token ids with --tokens FILE") if texts else None
    vocabulary_size = vocabulary(captured.program)
    parts = [_split_text(tokenizer, path, settings.hold_out, vocabulary_size) for path in texts]
    parts += [_split_tokens(ids, settings.hold_out) for ids in streams]
    train, held_out = (_rows([ids for part in parts for ids in part[side]], length) for side in (0, 1))
    if not len(train) or not len(held_out):
        count = sum(len(ids) for part in parts for side in part for ids in side)
        raise UsageError(
            f"the texts are too short: {count:,} tokens give {len(train)} rows of {length} to train on and "
            f"{len(held_out)} held out; both need one (a smaller --sequence makes shorter rows)"
        )
    return HealingText(train, spread(held_out, max(1, settings.evaluate_tokens // length)), _hashes(*texts, *tokens))


def _split_text(
    tokenizer: Any, path: Path, hold_out: float, vocabulary_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of a text's beginning and of its end, cut where a line ends."""
    text = read_text(path, "--text")
    cut = text.find("\n", round(len(text) * (1 - hold_out))) + 1 or round(len(text) * (1 - hold_out))
    train, held_out = (token_ids(tokenizer, part, vocabulary_size, "--text") for part in (text[:cut], text[cut:]))
    return [train], [held_out]


def _split_tokens(ids: TokenIds, hold_out: float) -> tuple[list[list[int]], list[list[int]]]:
    cut = round(len(ids) * (1 - hold_out))
    if ids.ndim == 1:
        return [ids[:cut].tolist()], [ids[cut:].tolist()]
    return ids[:cut].tolist(), ids[cut:].tolist()


def _rows(streams: list[list[int]], length: int) -> Tensor:
    """Whole rows of streams; the rest of a stream that fills none is left out."""
    rows = [torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length) for ids in streams]
    return torch.cat(rows) if rows else torch.empty((0, length), dtype=torch.int64)


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
