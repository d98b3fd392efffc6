"""The tokens that an artifact is healed on, as its source reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kraken_compiler.capture import Capture
from kraken_compiler.errors import UsageError
from kraken_compiler.passes.sample_inputs import vocabulary
from kraken_compiler.quality.healing.settings import HealSettings
from kraken_compiler.texts.read import load_tokenizer, longest_row, require_one_text
from kraken_compiler.training.rows import TrainingText, read_rows


def read_texts(
    captured: Capture, texts: Sequence[Path], tokens: Sequence[Path], settings: HealSettings
) -> TrainingText:
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
    tokenizer = load_tokenizer(captured, "--text", "give token ids with --tokens FILE") if texts else None
    longest = longest_row(captured, settings.sequence)
    return read_rows(texts, tokens, tokenizer, vocabulary(captured.program), longest, settings)
