"""Texts as tokens: to measure a rewritten model on, to calibrate it on, and to train on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch
from torch import Tensor

from kraken_compiler._torch_compat import largest_size
from kraken_compiler.errors import InputFileError, UsageError, os_errors_as
from kraken_compiler.ir.program import Program
from kraken_compiler.ir.size_checks import longest_allowed, token_rules
from kraken_compiler.lanes.derived_inputs import find_derived
from kraken_compiler.passes.sample_inputs import (
    NO_LIMIT,
    position_limit,
    sample_inputs,
    text_input,
    token_input,
    vocabulary,
)
from kraken_compiler.text import ENCODING, not_utf8
from kraken_compiler.texts.token_files import is_token_file, read_token_file, token_rows

if TYPE_CHECKING:
    from kraken_compiler.capture import Capture

_ROW = 256
_ROWS_AT_ONCE = 4
_RANDOM_BATCHES = 2
_PIECE_CHARACTERS = 1 << 20
_WORD = "a"

Tokenize = Callable[[str], list[int]]
"""Text -> token ids, without special tokens."""


@dataclass(frozen=True)
class TextChoice:
    """A user's choice of a text to measure on.

    Attributes:
        path: The text file, of any size; None means the built-in sample.
        limit: Most tokens to read; None means all.
    """

    path: Path | None = None
    limit: int | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str] | None, limit: int | None) -> Self:
        """The choice from a path and a limit, as an interface has them."""
        return cls(Path(path) if path is not None else None, limit)


@dataclass
class TokenText:
    """A text as batches of token ids; iterating reads it from its beginning, piece by piece.

    Attributes:
        name: What it is, for the record.
        expected_tokens: Number of tokens; an estimate until the text has been read.
    """

    name: str
    expected_tokens: int
    _batches: Callable[[TokenText], Iterator[Tensor]] = field(repr=False)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches int64 [rows, sequence]. A text shorter than one row gives one batch of that length.

        Raises:
            UsageError: The text is too short to measure anything on.
            InputFileError: It cannot be read.
        """
        return self._batches(self)


def evaluation_text(captured: Capture, choice: TextChoice) -> TokenText | str:
    """A text file or the built-in sample, as the source model's tokens.

    A model without a tokenizer is measured on random tokens, and the name says so.

    Args:
        captured: The source model.
        choice: Which text, and how much of it.

    Returns:
        The tokens, or the reason why the model cannot be measured.

    Raises:
        UsageError: A text was given for a model that reads no text, or a limit that leaves none.
        InputFileError: The text cannot be opened.
    """
    program = captured.program
    path, limit = choice.path, choice.limit
    reason = _unreadable_reason(program)
    if reason:
        if path is not None:
            raise UsageError(f"--text: {reason}")
        return f"no quality measurement: {reason}"
    row = longest_row(captured)
    if limit is not None:
        if limit < 2:
            raise UsageError(f"--text-tokens {limit}: at least 2 are needed to measure anything")
        row = min(row, limit)
    if path is not None and is_token_file(path):
        return _token_file_text(program, path, row, limit)
    if captured.origin.tokenizer is None and path is None:
        batches = _random_batches(program, row)
        count = sum(batch.numel() for batch in batches)
        return TokenText("random tokens (the model has no tokenizer)", count, lambda text: iter(batches))
    tokenizer = load_tokenizer(captured, "--text")

    def tokenize(text: str) -> list[int]:
        return token_ids(tokenizer, text, vocabulary(program), "--text", special=False)

    with _open_text(path) as (_, size):
        expected_tokens = limit or size
    name = str(path) if path is not None else "the built-in sample"
    begin = beginning_of_text(tokenizer)
    return TokenText(name, expected_tokens, lambda text: _batches_of(text, path, tokenize, begin, row, limit))


def load_tokenizer(captured: Capture, option: str, instead: str = "give token ids in a .npy file") -> Any:
    """The source model's tokenizer.

    Args:
        captured: The source model.
        option: The option that named a text, for messages.
        instead: What to do if there is none.

    Raises:
        UsageError: It has none.
    """
    if captured.origin.tokenizer is None:
        where = captured.origin.path or "the model"
        raise UsageError(f"{option}: {where} has no tokenizer, so it cannot read text; {instead}")
    return captured.origin.tokenizer.load()


def token_ids(tokenizer: Any, text: str, vocabulary_size: int, option: str, *, special: bool = True) -> list[int]:
    """A text's tokens, all of which the model knows.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerBase`.
        text: The text.
        vocabulary_size: How many tokens the model knows.
        option: The option that named the text, for messages.
        special: Add the special tokens that begin or end a text.

    Raises:
        InputFileError: The tokenizer makes others of it.
    """
    ids: list[int] = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    if ids and max(ids) >= vocabulary_size:
        raise InputFileError(
            f"{option}: the tokenizer makes token {max(ids)} of the text, the model knows 0 to {vocabulary_size - 1}: "
            "they do not belong together"
        )
    return ids


def beginning_of_text(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer begins every text with, as most of Llama's and Gemma's kind do.

    A model that was trained so has seen no text without them, so every row that it is measured, calibrated or healed on
    begins with them, wherever in a text it is from.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerBase`.
    """
    whole, plain = (
        tokenizer(_WORD, verbose=False, add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    begin: list[int] = whole[: next(starts, 0)]
    return begin


def sample_text() -> str:
    """The built-in sample."""
    return files("kraken_compiler.texts").joinpath("sample.txt").read_text(encoding="utf-8")


def read_text(path: Path, option: str) -> str:
    """Read a whole text.

    Args:
        path: The file.
        option: The option that named it, for messages.

    Raises:
        InputFileError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        raise not_utf8(path, option) from error
    except OSError as error:
        raise InputFileError(f"{option}: cannot read {path}: {error.strerror or error}") from error


def text_files(path: Path, option: str) -> list[Path]:
    """A file by itself; of a directory all files in it, at any depth, in the order of their names.

    Args:
        path: The file or directory.
        option: The option that named it, for messages.

    Raises:
        InputFileError: The directory has none.
    """
    with os_errors_as(f"{option}: cannot read {path}"):
        if not path.is_dir():
            return [path]
        found = sorted(file for file in path.rglob("*") if file.is_file())
    if not found:
        raise InputFileError(f"{option}: there is no file in {path}")
    return found


def longest_row(captured: Capture, limit: int = _ROW) -> int:
    """The longest row of tokens, at most `limit`, that the model takes."""
    program = captured.program
    most = min(limit, position_limit(program), _proven_limit(program), _config_limit(captured.config))
    return longest_allowed(token_rules(program.call, program.inputs), most)


def token_batches(
    ids: Iterator[int], sequence: int = _ROW, rows: int = _ROWS_AT_ONCE, begin: Sequence[int] = ()
) -> Iterator[Tensor]:
    """Cut a stream of token ids into batches [rows, sequence]; the rest that fills no row is left out.

    A stream shorter than one row gives one batch of that length, or none if it has fewer than two tokens.

    Args:
        ids: The stream.
        sequence: Tokens of a row.
        rows: Rows of a batch.
        begin: What every row begins with.
    """
    own = sequence - len(begin)
    first = True
    while chunk := list(islice(ids, rows * own)):
        whole = len(chunk) // own
        if whole:
            yield beginning_with(begin, torch.tensor(chunk[: whole * own]).view(whole, own))
        elif first and len(chunk) + len(begin) > 1:
            yield beginning_with(begin, torch.tensor([chunk]))
        first = False


def beginning_with(begin: Sequence[int], rows: Tensor) -> Tensor:
    """Rows of tokens, int64 [rows, sequence], behind the tokens that every one begins with."""
    return torch.cat((torch.tensor(begin, dtype=torch.int64).expand(len(rows), -1), rows), 1)


def _token_file_text(program: Program, path: Path, row: int, limit: int | None) -> TokenText:
    ids = read_token_file(path, vocabulary(program), "--text")
    rows = token_rows(ids, min(row, ids.shape[-1]))
    rows = rows[: limit // rows.shape[1]] if limit is not None else rows
    return TokenText(str(path), rows.numel(), lambda text: iter(torch.split(rows, _ROWS_AT_ONCE)))


def _batches_of(
    text: TokenText, path: Path | None, tokenize: Tokenize, begin: list[int], row: int, limit: int | None
) -> Iterator[Tensor]:
    empty = True
    row = max(row, len(begin) + 1)
    most = None if limit is None else max(0, limit - len(begin) * -(-limit // row))
    for batch in token_batches(islice(_ids_of(text, path, tokenize, limit), most), row, begin=begin):
        empty = False
        yield batch
    if empty:
        raise UsageError(f"--text: {text.name} is too short to measure anything on")


def _ids_of(text: TokenText, path: Path | None, tokenize: Tokenize, limit: int | None) -> Iterator[int]:
    count = bytes_read = 0
    with _open_text(path) as (file, size):
        for piece in _pieces(file, path, text.name):
            ids = tokenize(piece)
            count += len(ids)
            bytes_read += len(piece.encode())
            whole = round(count * size / bytes_read)
            text.expected_tokens = whole if limit is None else min(limit, whole)
            yield from ids


def _pieces(file: TextIO, path: Path | None, name: str) -> Iterator[str]:
    """Parts of a text, cut where a line ends: tokens hardly ever reach from one line into the next."""
    try:
        while piece := file.read(_PIECE_CHARACTERS):
            yield piece + file.readline(_PIECE_CHARACTERS)
    except UnicodeDecodeError as error:
        raise not_utf8(path or Path(name), "--text") from error
    except OSError as error:
        raise InputFileError(f"--text: cannot read {name}: {error.strerror or error}") from error


@contextmanager
def _open_text(path: Path | None) -> Iterator[tuple[TextIO, int]]:
    """Open a text; gives the file and its size in bytes."""
    where: Any = path if path is not None else files("kraken_compiler.texts").joinpath("sample.txt")
    with os_errors_as(f"--text: cannot read {path}"):
        file = where.open(encoding=ENCODING)
        size = path.stat().st_size if path is not None else len(where.read_bytes())
    with file:
        yield file, max(1, size)


def require_one_text(program: Program, what: str) -> None:
    """Make sure that a model reads a text, and nothing beside it.

    Args:
        program: The source model's.
        what: What needs it, for the message.

    Raises:
        UsageError: It reads none, or an encoder and a decoder read one each.
    """
    reason = _unreadable_reason(program)
    if not reason and token_input(program) is None:
        reason = "the model reads two texts, one in its encoder and one in its decoder"
    if reason:
        raise UsageError(f"{what}: {reason}")


def _unreadable_reason(program: Program) -> str:
    """The reason why a model cannot be measured on text, "" if it can; an encoder reads what its decoder continues."""
    if text_input(program) is None:
        return "the model reads no tokens"
    others = [spec.parameter for spec in program.inputs if find_derived(spec, program.inputs) is None]
    return f"a text is all there is, and the model also reads '{others[0]}'" if others else ""


def _random_batches(program: Program, row: int) -> list[Tensor]:
    spec = text_input(program)
    assert spec is not None
    return [sample_inputs(program, 2, row, seed)[spec.name] for seed in range(_RANDOM_BATCHES)]


def _proven_limit(program: Program) -> int:
    """The longest sequence that fits the graph's own tables, such as a causal mask that the model keeps."""
    spec = text_input(program)
    assert spec is not None
    ids = next(node.meta["val"] for node in program.graph.nodes if node.name == spec.name)
    return largest_size(ids.shape[1]) or NO_LIMIT


def _config_limit(config: dict[str, Any] | None) -> int:
    """The longest sequence that the source's config allows: the graph hides some tables. Without one a short one."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    limits = [config[name] for name in names if isinstance(config.get(name), int)] if config else []
    return min(limits, default=_ROW)
