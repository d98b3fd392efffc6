"""Text that is written token by token is the tokenizer's own, wherever a context is cut and whatever the bytes are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kraken_compiler.generate.text_stream import CleanedStream
from kraken_compiler.generate.tokenizer import TextCodec, TextStream
from tests.reports.tokenizers_of_kinds import KINDS, bad_byte, decode_with, ids_of

CASES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BYTES = KINDS["byte fallback"]

WHOLE = [
    "🎉🎉🎉🎉",
    "👩‍👩‍👧‍👦 👩🏽‍🚀",
    "e\u0301a\u0308\u0323 é",
    "שלום عليكم",
    "ሰላም ለዓለም",
    "\n\n🎉\n\tconst\r\n",
    "\ufffd real",
    "a\u2028b\x00c",
    "🇩🇪" * 40,
]


def written(stream: TextStream | CleanedStream, ids: Sequence[int]) -> str:
    return "".join([*map(stream.push, ids), stream.finish()])


def common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((index for index, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))


@pytest.mark.parametrize("text", WHOLE)
@pytest.mark.parametrize("hint", [True, False])
def test_characters_of_bytes(text: str, hint: bool) -> None:
    """Also where nobody says which tokens are bytes."""
    decode, ids = decode_with(BYTES()), list(text.encode())
    assert written(TextStream(decode, (), bad_byte(BYTES()) if hint else None), ids) == decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@CASES
@given(data=st.data())
def test_any_tokens_of_any_tokenizer(kind: str, data: st.DataObject) -> None:
    """Invalid bytes, special tokens, and a prompt that ends within a character too."""
    made = KINDS[kind]()
    decode, ids, before = decode_with(made), data.draw(ids_of(made)), data.draw(ids_of(made))
    assert written(TextStream(decode, (), bad_byte(made)), ids) == decode(ids)
    prompt, whole = decode(before), decode([*before, *ids])
    assert written(TextStream(decode, before, bad_byte(made)), ids) == whole[common(prompt, whole) :]


def test_a_prompt_within_a_character() -> None:
    """What is written then begins with the whole character."""
    decode, ids = decode_with(BYTES()), [257, *"🎉🎉".encode(), 256]
    for cut in range(1, len(ids)):
        whole = bytes(ids[1:cut]).decode(errors="ignore")
        rest = written(TextStream(decode, ids[:cut], bad_byte(BYTES())), ids[cut:])
        # The tokenizer writes none of a run of bytes of which a part is missing.
        assert rest == ("🎉🎉 a" if (cut - 1) % 4 else "🎉🎉 a"[len(whole) :])


def test_one_bad_byte_takes_the_run_of_bytes_back() -> None:
    """As it does in the tokenizer: so nothing of the run may have been written before."""
    decode, ids = decode_with(BYTES()), [256, 10, *"🎉".encode(), 0xFF, 257]
    stream = TextStream(decode, (), bad_byte(BYTES()))
    pieces = [stream.push(token) for token in ids]
    assert pieces == [" a", "", "", "", "", "", "", "\ufffd" * 6 + " Hello"]
    assert decode(ids) == "".join(pieces)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    made = KINDS["byte level"]()
    stream = TextStream(decode_with(made))
    ids = [made.token_to_id(letter) for letter in "hÃ©ðŁİī!"]
    assert [stream.push(token) for token in ids] == ["h", "", "é", "", "", "", "🎉", "!"]
    fallback = TextStream(decode_with(BYTES()), (), bad_byte(BYTES()))
    assert [fallback.push(token) for token in (257, *"🎉".encode(), 256)] == [" Hello", "", "", "", "", "🎉 a"]


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("byte fallback", [256, 258] * 1500),
        ("byte fallback", list("ሰላም".encode()) * 300),
        ("byte fallback", [10] * 3000),
        ("byte fallback", [0xF0] * 3000),
        ("byte level", [0] * 3000),
        ("byte level", [KINDS["byte level"]().token_to_id(letter) for letter in "ðŁİī"] * 750),
        ("unigram", [1] * 3000),
        ("words", [KINDS["words"]().token_to_id("</s>")] * 3000),
    ],
)
def test_long_texts_do_not_get_slower(kind: str, ids: list[int]) -> None:
    """Tokens that are decoded for every new one, on average; also in runs in which nothing is certain."""
    made, asked = KINDS[kind](), 0

    def counting(tokens: Sequence[int]) -> str:
        nonlocal asked
        asked += len(tokens)
        return decode_with(made)(tokens)

    assert written(TextStream(counting, (), bad_byte(made)), ids) == decode_with(made)(ids)
    assert asked < 130 * len(ids)


@CASES
@given(data=st.data())
def test_transformers_cleaning_up(data: st.DataObject) -> None:
    """Spaces before punctuation go; some tokens later than they came."""
    from transformers import PreTrainedTokenizerFast

    names = ["don", "n", "'", "t", "s", "m", ".", "?", "a", "re", "'ve", "</s>"]
    made = words_of(names)
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True))
    ids = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=14))
    assert written(codec.stream(), ids) == codec.decode(ids)
    assert codec.decode([0, 1, 2, 3]) == "donn't"


def words_of(names: list[str]) -> object:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="a"))
    made.add_special_tokens(["</s>"])
    return made


def test_a_codec_knows_its_bytes() -> None:
    from transformers import PreTrainedTokenizerFast

    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=BYTES()))
    ids = [10, *"🎉".encode(), 0xFF]
    assert written(codec.stream(), ids) == codec.decode(ids) == "\ufffd" * 6
    ids = [257, *"🎉🎉🎉".encode(), 256]
    assert written(codec.stream(), ids) == codec.decode(ids) == " Hello🎉🎉🎉 a"
