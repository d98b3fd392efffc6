"""One small tokenizer of every kind, and token ids to try them with: whole characters, single bytes, anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Ids = list[int]

_PIECES = ["▁a", "▁Hello", "b", "▁", "é", "▁שלום", "\u0301", "\u200d", "👩", "\ufffd", "▁▁▁", "."]


def byte_fallback(*, strip: bool) -> Tokenizer:
    """Pieces, and a token for every byte (Llama 2, Mistral, Gemma); ids 0 to 255 are the bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {piece: 256 + index for index, piece in enumerate(_PIECES)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return _with_added(made)


def byte_level() -> Tokenizer:
    """Bytes as letters, and tokens that hold parts of characters (GPT-2, Llama 3, Qwen)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["Ġhello", "ðŁ", "Ģa", "Ġ", "ðŁİ", "ī", "ï¿½", "©", "Ã©"]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(dict.fromkeys([*letters, *pieces]))}, []))
    made.decoder = decoders.ByteLevel()
    return _with_added(made)


def wordpiece() -> Tokenizer:
    """Words and their continuations (BERT); spaces before punctuation are taken out."""
    pieces = [
        "[UNK]",
        "he",
        "##llo",
        "'",
        "s",
        "##s",
        ".",
        "n",
        "##t",
        "é",
        "##\u0301",
        "don",
        "t",
        "\ufffd",
        "##\ufffd",
    ]
    made = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece(cleanup=True)
    return _with_added(made)


def unigram() -> Tokenizer:
    """Pieces with leading spaces (T5, XLM-R)."""
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ("▁", "▁a", "b", "▁▁", "é", "\u0301", "▁🎉"))]
    made = Tokenizer(models.Unigram(pieces, 0))
    made.decoder = decoders.Metaspace()
    return _with_added(made)


def words() -> Tokenizer:
    """Whole words, without a decoder: a space between any two."""
    return _with_added(Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, ".": 3}, unk_token="<unk>")))


def suffixes() -> Tokenizer:
    """Pieces whose last one in a word is marked."""
    made = Tokenizer(models.BPE({"a</w>": 0, "b": 1, "c</w>": 2}, []))
    made.decoder = decoders.BPEDecoder()
    return _with_added(made)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte fallback": cache(lambda: byte_fallback(strip=False)),
    "byte fallback, leading space stripped": cache(lambda: byte_fallback(strip=True)),
    "byte level": cache(byte_level),
    "wordpiece": cache(wordpiece),
    "unigram": cache(unigram),
    "words": cache(words),
    "suffixes": cache(suffixes),
}


def decode_with(made: Tokenizer) -> Callable[[Sequence[int]], str]:
    """The text of token ids without special tokens."""
    return lambda ids: made.decode(list(ids), skip_special_tokens=True)


def bad_byte(made: Tokenizer) -> int | None:
    """The token of a byte that is in no character, where there is byte fallback."""
    return made.token_to_id("<0xFF>")


def ids_of(made: Tokenizer, longest: int = 25) -> st.SearchStrategy[Ids]:
    """Token ids: any, the bytes of any text, and any bytes."""
    parts: list[st.SearchStrategy[Ids]] = [st.integers(0, made.get_vocab_size() - 1).map(lambda token: [token])]
    if bad_byte(made) is not None:
        parts += [st.text(max_size=4).map(_utf8), st.binary(max_size=4).map(list)]
    elif made.get_vocab_size() > 256:
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        texts = st.text(max_size=4).filter(bool)
        parts.append(texts.map(lambda text: [made.token_to_id(letter) for letter in spell(text)[0][0]]))
    return st.lists(st.one_of(parts), max_size=longest).map(lambda lists: [token for ids in lists for token in ids])


def _utf8(text: str) -> Ids:
    return list(text.encode("utf-8", "ignore"))


def _with_added(made: Tokenizer) -> Tokenizer:
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["[tool é]"])
    return made
