"""Text on its way to and from token ids: characters in pieces, chats, lines, and options as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.artifact.read import open_artifact
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.lines import Lines
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.generate.tokenizer import TextCodec, TextStream
from tests.toy_lane_program import write_toy

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }} {{ message.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant {% endif %}"
)


def tokenizer(**options: Any) -> Any:
    """A tokenizer of bytes with three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<|turn|>", "<|done|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", **options)


END, TURN, DONE = 256, 257, 258


def test_text_grows_by_whole_characters() -> None:
    """The bytes of a character that several tokens share are held back until it is whole."""
    pieces = [b" Pa", b"ris ", "é".encode()[:1], "é".encode()[1:], b"!", "é".encode()[:1]]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[token] for token in ids).decode(errors="replace")

    stream = TextStream(decode)
    assert [stream.push(token) for token in range(6)] == [" Pa", "ris ", "", "é", "!", ""]
    assert stream.finish() == "\ufffd"
    assert TextStream(decode).finish() == ""


@pytest.mark.parametrize("text", ["déjà vu, naïve ☃ 🐙🐙 end", "\ufffd\ufffd ok", "plain"])
def test_a_long_text_is_its_pieces(text: str) -> None:
    codec = TextCodec(tokenizer())
    for before in ("", "and before it "):
        stream = TextStream(codec.decode, codec.encode(before))
        pieces = [stream.push(token) for token in codec.encode(text * 5)]
        assert "".join(pieces) + stream.finish() == text * 5
        assert len([piece for piece in pieces if piece]) >= len(text)


def test_spaces_between_prompt_and_continuation() -> None:
    """A tokenizer of words writes a space between two of them, so the first new one needs what came before."""

    def decode(ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids)

    stream = TextStream(decode, [1, 2, 3])
    assert [stream.push(4), stream.push(5)] == [" w4", " w5"]
    assert TextStream(decode).push(4) == "w4"


def test_chats() -> None:
    codec = TextCodec(tokenizer(chat_template=TEMPLATE))
    assert codec.can_chat
    ids = codec.encode_chat([{"role": "user", "content": "hi"}])
    assert (ids[0], ids[-1]) == (TURN, codec.encode(" ")[0])
    assert codec.decode(ids) == "user hi\nassistant "
    # The template ends an answer with another token than the tokenizer's EOS.
    assert codec.eos == {END, DONE}
    assert TextCodec(tokenizer(chat_template=TEMPLATE), [7]).eos == {7, END, DONE}


def test_tokenizers_that_cannot_chat() -> None:
    codec = TextCodec(tokenizer())
    assert not codec.can_chat
    assert codec.eos == {END}
    with pytest.raises(UsageError, match="no chat template"):
        codec.encode_chat([{"role": "user", "content": "hi"}])
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}x"
    with pytest.raises(UsageError, match="does not take these messages: no system messages"):
        TextCodec(tokenizer(chat_template=strict)).encode_chat([{"role": "system", "content": "hi"}])
    # What follows an answer in this template is no special token.
    plain = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert TextCodec(tokenizer(chat_template=plain)).eos == {END}


def test_missing_packages_are_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(write_toy(tmp_path / "toy", 2, tokenizer_saver=tokenizer().save_pretrained))
    with monkeypatch.context() as lacking:
        lacking.setitem(sys.modules, "transformers", None)
        with pytest.raises(UsageError, match=r"reading the tokenizer in .* needs packages .*\(.*transformers"):
            TextCodec.of(artifact)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    # Plain text needs no template.
    codec = TextCodec(tokenizer(chat_template=TEMPLATE))
    assert codec.decode(codec.encode("hi")) == "hi"
    with pytest.raises(UsageError, match=r"reading the chat template needs packages .*\(.*jinja2"):
        codec.encode_chat([{"role": "user", "content": "hi"}])


def test_lines() -> None:
    reading, writing = os.pipe()
    lines = Lines(reading)
    assert lines.poll(0.01) is None
    os.write(writing, "one\r\ntwo é\n\nth".encode())
    assert [lines.poll(0.01) for _ in range(4)] == ["one", "two é", "", None]
    assert not lines.ended
    os.write(writing, b"ree")
    os.close(writing)
    assert lines.poll(0.01) == "three"
    assert lines.ended
    assert lines.poll(0.01) is None
    os.close(reading)


def test_options_travel_as_json(tmp_path: Path) -> None:
    options = RunOptions(
        artifact=tmp_path, prompt=["é", ""], prompt_file=tmp_path / "a", top_p=0.5, chat=False, max_new_tokens=3
    )
    assert RunOptions.from_json(options.to_json()) == options
    assert RunOptions.from_json(RunOptions(artifact=tmp_path).to_json()) == RunOptions(artifact=tmp_path)
