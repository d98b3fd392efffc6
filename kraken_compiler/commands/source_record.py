"""What an artifact keeps of its source: where it was, how answers begin, how long it reads, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kraken_compiler.artifact.manifest import Source
from kraken_compiler.artifact.tokenizer_files import generation_config
from kraken_compiler.capture import Capture
from kraken_compiler.generate.tokenizer import TextCodec
from kraken_compiler.lanes.derived_inputs import reads_source
from kraken_compiler.passes.sample_inputs import text_input, vocabulary
from kraken_compiler.texts.read import sample_text, token_ids

_POSITIONS_NAMES = ("max_position_embeddings", "n_positions")


def source_record(captured: Capture, input_specs: Sequence[str], dtype: torch.dtype | None) -> Source:
    """What a manifest says of a source.

    Args:
        captured: The source.
        input_specs: How it was captured, see `capture`.
        dtype: What it was converted to; None if it was not.
    """
    origin = captured.origin
    path = Path(origin.path).absolute() if origin.path else None
    return Source(
        kind=origin.kind,
        name=path.name if path else origin.model_class,
        path=str(path) if path else "",
        model_class=origin.model_class,
        answer_begins=_answer_begins(captured),
        max_positions=max_positions(captured.config),
        stop_tokens=_stop_tokens(captured),
        input_specs=tuple(input_specs),
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else "",
    )


def _answer_begins(captured: Capture) -> tuple[int, ...]:
    """The tokens that an encoder-decoder's answer begins with, as transformers takes them when it generates."""
    config = captured.config
    if config is None or not reads_source(captured.program.inputs):
        return ()
    directory = Path(captured.origin.path or "")
    own = (generation_config(directory, of_config=False) if captured.origin.kind == "huggingface" else None) or {}
    settings = {**config, **{name: value for name, value in own.items() if value is not None}}
    start, forced_start = settings.get("decoder_start_token_id"), settings.get("forced_bos_token_id")
    start = settings.get("bos_token_id") if start is None else start
    return tuple(token for token in (start, forced_start) if type(token) is int) if type(start) is int else ()


def _stop_tokens(captured: Capture) -> tuple[int, ...]:
    """The tokens that end a text, by the model's configs and its tokenizer: they hold for token ids as for texts."""
    tokenizer = captured.origin.tokenizer
    if tokenizer is None:
        return captured.stop_tokens
    return tuple(sorted(TextCodec(tokenizer.load(), captured.stop_tokens).eos))


def max_positions(config: dict[str, Any] | None) -> int | None:
    """The longest sequence by the source's config, or by the part of it that describes the language model."""
    parts = [config, *(config.get(name) for name in ("text_config", "decoder"))] if config else []
    limits = [part.get(name) for part in parts if isinstance(part, dict) for name in _POSITIONS_NAMES]
    return next((limit for limit in limits if type(limit) is int and limit > 0), None)


def tokenizer_notes(captured: Capture) -> tuple[str, ...]:
    """Notes for a user on the source's tokenizer, which is refused here if it is damaged."""
    if captured.origin.tokenizer is None:
        return ()
    notes, tokenizer = captured.origin.tokenizer.check()
    vocabulary_size = vocabulary(captured.program) if text_input(captured.program) is not None else len(tokenizer)
    if len(tokenizer) <= vocabulary_size:
        return notes
    # Tokens that a few texts have are no reason to refuse a model; some models ship with them.
    token_ids(tokenizer, sample_text(), vocabulary_size, str(captured.origin.path))
    return (
        *notes,
        f"the tokenizer has {len(tokenizer)} tokens, the model knows {vocabulary_size}; "
        "text with the others is refused",
    )


def tokenizer_saver(captured: Capture) -> Callable[[Path], None] | None:
    """What writes the source's tokenizer into a directory; None if it has none."""
    tokenizer = captured.origin.tokenizer
    return tokenizer.save if tokenizer is not None else None
