"""A tokenizer for a model that is trained from scratch: byte pairs, learnt from the same texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kraken_compiler.errors import UsageError, missing_packages

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Learn a byte-level BPE tokenizer.

    Args:
        texts: What to learn from; the same texts give the same tokenizer.
        vocabulary: How many tokens it has at most; few texts give fewer.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        UsageError: The vocabulary does not hold the bytes, or packages are not installed.
    """
    if vocabulary < _BYTES + 1:
        raise UsageError(
            f"a vocabulary of {vocabulary} is too small for a tokenizer: {_BYTES} bytes and the end of a text"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise missing_packages("learning a tokenizer", error) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
