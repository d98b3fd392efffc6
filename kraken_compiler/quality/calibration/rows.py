"""The rows of tokens that calibration reads, out of text files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kraken_compiler.errors import UsageError
from kraken_compiler.ir.size_checks import BATCH, SEQUENCE, token_rules
from kraken_compiler.ir.size_rules import broken_rule
from kraken_compiler.lanes.logits import is_causal, lane_logits
from kraken_compiler.lanes.reference import read_from_source
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.texts.read import (
    beginning_of_text,
    load_tokenizer,
    longest_row,
    read_text,
    require_one_text,
    text_files,
    token_ids,
)
from kraken_compiler.texts.token_files import TokenIds, is_token_file, read_token_file, spread, token_rows

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_CHARACTERS_PER_TOKEN = 6
_HELD_OUT_SHARE = 6
_UNSEEN_ROWS, _WATCHED_ROWS = 16, 8
_ROWS_AT_ONCE = 8
_UNSEEN_ROWS_AT_ONCE = 2
"""Rows whose logits are held at once: with a large vocabulary they take more than the model."""
_SINGLE_SHARE = 8
"""One in so many of the rows to fit, and to choose strengths on, is cut into rows of a single token."""

_Row = tuple[int, list[int]]
"""A row with the number of its text."""

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class CalibrationText:
    """Rows of tokens, each out of one text.

    Attributes:
        fitted: Batches int64 [rows, sequence] to fit: of long rows, and then of rows of a single token.
        held_out: Batches to choose the ridge strengths on. With four texts or more they are texts of their own: a
            strength that holds on another text holds on text that nobody has seen.
        watched: Rows int64 [rows, sequence] that nothing is fitted to, to decide whether training on the others helped;
            none if the texts are short.
        unseen: Batches that calibration leaves alone, to measure it on.
    """

    fitted: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    watched: Tensor
    unseen: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Tokens that calibration uses."""
        return sum(ids.numel() for ids in self.batches)

    @property
    def batches(self) -> list[Tensor]:
        """All batches that it uses, those held out last."""
        return [*self.fitted, *self.held_out]

    @property
    def batch_is_held_out(self) -> list[bool]:
        """For each of them, see `calibrate`."""
        return [False] * len(self.fitted) + [True] * len(self.held_out)

    @property
    def rows(self) -> Tensor:
        """All rows that are no single tokens, int64 [rows, sequence]."""
        return long_rows(self.batches)[0]


def long_rows(batches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The longest rows of batches as one tensor, and the batches of shorter ones."""
    length = max(ids.shape[1] for ids in batches)
    return (
        torch.cat([ids for ids in batches if ids.shape[1] == length]),
        [ids for ids in batches if ids.shape[1] != length],
    )


def calibration_text(captured: Capture, paths: Sequence[Path], tokens: int) -> CalibrationText:
    """Read rows of tokens, as many from every text as far as they reach, spread over its length.

    Args:
        captured: The source model.
        paths: Text files, files of token ids (see `read_token_file`), and directories of them.
        tokens: How many tokens to calibrate on; fewer if the texts are short.

    Raises:
        UsageError: The model reads no text, or the texts are too short.
        InputFileError: A text cannot be read.
    """
    require_one_text(captured.program, "--calibrate")
    texts = [_read_file(captured, file) for path in paths for file in text_files(path, "--calibrate")]
    # A row of a token file is a document, which may be short.
    documents = [text.shape[-1] for text in texts if isinstance(text, np.ndarray)]
    row = min([longest_row(captured), *documents])
    count = max(1, tokens // row)
    quota = -(-(count + _UNSEEN_ROWS + _WATCHED_ROWS) // len(texts))
    tokenizer = cache(lambda: load_tokenizer(captured, "--calibrate"))

    def tokenize(text: str) -> list[int]:
        return token_ids(tokenizer(), text, vocabulary(captured.program), "--calibrate", special=False)

    begin = [] if all(isinstance(text, np.ndarray) for text in texts) else beginning_of_text(tokenizer())
    rows = [text_rows for text in texts if (text_rows := _rows(text, quota, row, tokenize, begin))]
    source = lane_logits(captured.program, read_from_source(captured.program, captured.store.read))
    rules = token_rules(captured.program.call, captured.program.inputs)
    # Where every text begins with the same tokens, every row has them, and the next ones have them before them.
    singles = (
        bool(rows)
        and not begin
        and broken_rule(rules, {BATCH: 1, SEQUENCE: 1}) is None
        and is_causal(source, torch.tensor(rows[0][:_UNSEEN_ROWS_AT_ONCE]))
    )
    return divide(rows, count, singles=singles)


def divide(texts: Sequence[Sequence[list[int]]], count: int, *, singles: bool = True) -> CalibrationText:
    """Divide rows into those that are fitted, held out or unseen.

    Args:
        texts: For every text its rows, all of one length.
        count: How many rows to calibrate on.
        singles: Cut some of them into rows of a single token. A causal model's first token is like no other, whatever
            follows it, and long rows have too few of them to fit. (Rows of 4 or of 8 tokens help less or do harm.)

    Raises:
        UsageError: There are fewer than three rows.
    """
    total = sum(map(len, texts))
    if total < 3:
        raise UsageError(f"--calibrate: the text has {total} rows of tokens, at least 3 are needed")
    in_turn = _in_turn(texts)
    # The last rows of the longest texts: next to nothing of what is fitted.
    in_turn, unseen = _without_last(in_turn, min(_UNSEEN_ROWS, max(1, total // 8)))
    in_turn, watched = _without_last(in_turn, min(_WATCHED_ROWS, total // 16))
    selection = in_turn[:count]
    several = len({text for text, _ in selection}) >= 4
    last = selection[-max(1, len(selection) // _HELD_OUT_SHARE) :]
    held_out = [entry for entry in selection if entry[0] % 4 == 2] if several else last
    held_out_ids = {id(row) for _, row in held_out}
    fitted_rows = [row for _, row in selection if id(row) not in held_out_ids]
    batches = _with_singles if singles else _batches
    return CalibrationText(
        batches(fitted_rows),
        batches([row for _, row in held_out]),
        torch.tensor([row for _, row in watched], dtype=torch.int64),
        torch.split(torch.tensor([row for _, row in unseen]), _UNSEEN_ROWS_AT_ONCE),
    )


def _without_last(rows: list[_Row], count: int) -> tuple[list[_Row], list[_Row]]:
    return rows[: len(rows) - count], rows[len(rows) - count :]


def _in_turn(texts: Sequence[Sequence[list[int]]]) -> list[_Row]:
    """Every text's first row, every text's second row, ..., with the text's number."""
    longest = max(map(len, texts))
    return [(number, text[place]) for place in range(longest) for number, text in enumerate(texts) if place < len(text)]


def _with_singles(rows: Sequence[list[int]]) -> tuple[Tensor, ...]:
    """Batches of rows, some of which are cut into rows of one token; all batches have about as many tokens."""
    whole = [row for place, row in enumerate(rows, start=1) if place % _SINGLE_SHARE]
    if len(whole) == len(rows):
        return _batches(rows)
    single = torch.tensor(rows[_SINGLE_SHARE - 1 :: _SINGLE_SHARE]).reshape(-1, 1)
    return (*_batches(whole), *torch.split(single, _ROWS_AT_ONCE * len(rows[0])))


def _batches(rows: Sequence[list[int]]) -> tuple[Tensor, ...]:
    return tuple(torch.split(torch.tensor(rows), _ROWS_AT_ONCE)) if rows else ()


def _read_file(captured: Capture, file: Path) -> str | TokenIds:
    if is_token_file(file):
        return read_token_file(file, vocabulary(captured.program), "--calibrate")
    return read_text(file, "--calibrate")


def _rows(text: str | TokenIds, count: int, row: int, tokenize: Tokenize, begin: list[int]) -> list[list[int]]:
    """At most `count` rows of `row` tokens, spread over a text; those of text begin as every text begins."""
    if not isinstance(text, str):
        return spread(token_rows(text, row), count).tolist()
    own = max(1, row - len(begin))
    span = own * _CHARACTERS_PER_TOKEN
    if len(text) <= count * span:
        ids = tokenize(text)
        return [begin + ids[start : start + own] for start in range(0, len(ids) - own + 1, own)][:count]
    step = len(text) // count
    starts = [number * step for number in range(count)]
    pieces = (tokenize(_from_line_start(text, start, span)) for start in starts)
    return [begin + ids[:own] for ids in pieces if len(ids) >= own]


def _from_line_start(text: str, start: int, length: int) -> str:
    """`length` characters from the next line on, if one begins soon: tokens hardly ever reach over a line's end."""
    line = text.find("\n", start, start + length // 4) + 1 if start else 0
    begin = line or start
    return text[begin : begin + length]
