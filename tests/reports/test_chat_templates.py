"""Chat templates are programs in the model's files: what is wrong with them concerns those who chat, in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.artifact.tokenizer_files import read_tokenizer
from kraken_compiler.capture.captured_model import TokenizerSource
from kraken_compiler.errors import UsageError
from kraken_compiler.generate import chat_template
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.generate.tokenizer import TextCodec
from tests.reports.text_functions import END, said, with_tokenizer
from tests.test_runtime_text import DONE, TEMPLATE, tokenizer

QUESTION = [{"role": "user", "content": "hi"}]
NAMED = {"rag": "R{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ('{{ "a" + none }}', "cannot be rendered: TypeError"),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "cannot be rendered: OverflowError"),
        ("{% for message in messages %}", "does not take these messages: Unexpected end of template"),
        ("{{ raise_exception('no\nchats') }}", "does not take these messages: no"),
        ("{{ messages[5].content.strip() }}", "does not take these messages: .* has no (element|attribute)|undefined"),
        ("{{ missing.name }}", "does not take these messages: 'missing' is undefined"),
        (17, "cannot be rendered: "),
        (ENDLESS, r"cannot be rendered: TimeoutError: it did not end within 0\.2 s"),
    ],
)
def test_a_broken_template(template: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_LONGEST_SECONDS", 0.2)
    codec = TextCodec(tokenizer(chat_template=template))
    assert codec.eos == {END}
    assert codec.decode(codec.encode("hi")) == "hi"
    with pytest.raises(UsageError, match=reason) as caught:
        codec.encode_chat(QUESTION)
    assert "\n" not in str(caught.value)


def test_named_templates() -> None:
    codec = TextCodec(tokenizer(chat_template=NAMED))
    assert not codec.can_chat
    with pytest.raises(UsageError, match="no default chat template; choose one with --chat-template: rag, tool_use"):
        codec.encode_chat(QUESTION)
    for name, sign in (("rag", "R"), ("tool_use", "T")):
        chosen = TextCodec(tokenizer(chat_template=NAMED), template=name)
        assert chosen.decode(chosen.encode_chat(QUESTION)) == f"{sign}hi"
    with pytest.raises(UsageError, match="--chat-template x: there is no such chat template; choose from rag, tool"):
        TextCodec(tokenizer(chat_template=NAMED), template="x")
    with pytest.raises(UsageError, match="there is no such chat template; the tokenizer has none"):
        TextCodec(tokenizer(), template="x")


def test_a_default_among_named_templates() -> None:
    """Its end of a turn ends a text; those of the others do not."""
    codec = TextCodec(tokenizer(chat_template=NAMED | {"default": TEMPLATE}))
    assert codec.decode(codec.encode_chat(QUESTION)) == "user hi\nassistant "
    assert codec.eos == {END, DONE}
    assert TextCodec(tokenizer(chat_template=NAMED | {"default": TEMPLATE}), template="rag").eos == {END}


@pytest.mark.parametrize("where", ["list", "list with default", "folder", "file"])
def test_where_templates_lie(tmp_path: Path, where: str) -> None:
    """In tokenizer_config.json or in files of their own, from the model to the artifact."""
    source = tmp_path / "model"
    tokenizer().save_pretrained(source)
    config = source / "tokenizer_config.json"
    named = NAMED | ({"default": TEMPLATE} if where != "list" else {})
    if where.startswith("list"):
        entries = [{"name": name, "template": template} for name, template in named.items()]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": entries}))
    else:
        (source / "chat_template.jinja").write_text(TEMPLATE)
    if where == "folder":
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "rag.jinja").write_text(NAMED["rag"])
    found = TokenizerSource(str(source))
    assert found.check()[0] == ()
    artifact = with_tokenizer(tmp_path / "artifact", found.save)
    codec = TextCodec.of(artifact)
    assert codec.can_chat == (where != "list")
    assert codec.decode(codec.encode("hi")) == "hi"
    if where != "file":
        assert TextCodec.of(artifact, "rag").encode_chat(QUESTION) == codec.encode("Rhi")


@pytest.mark.parametrize(
    "damage",
    [
        {"chat_template": [1, 2]},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": [{"name": "a/../../b", "template": "x"}]},
        {"chat_template": [{"name": "other", "template": 3}]},
        {"chat_template": "\ud800"},
        b"\xff\xfe not UTF-8",
    ],
)
def test_damaged_templates_do_not_stop_a_compile(tmp_path: Path, damage: Any) -> None:
    source = tmp_path / "model"
    tokenizer().save_pretrained(source)
    if isinstance(damage, bytes):
        (source / "chat_template.jinja").write_bytes(damage)
    else:
        config = source / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    found = TokenizerSource(str(source))
    (note,), _ = found.check()
    assert note.startswith("without a chat template, which is damaged: ")
    assert "\n" not in note
    (tmp_path / "saved").mkdir()
    found.save(tmp_path / "saved")
    shutil.rmtree(source)
    saved = TextCodec(read_tokenizer(tmp_path / "saved"))
    assert saved.decode(saved.encode("hi")) == "hi"
    assert not saved.can_chat


def lines_on_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    monkeypatch.setattr("kraken_compiler.generate.frontend.Lines", lambda: _lines(reading))
    monkeypatch.setattr("os.isatty", lambda descriptor: False)


def _lines(descriptor: int) -> Any:
    from kraken_compiler.generate.lines import Lines

    return Lines(descriptor)


@pytest.mark.parametrize("template", ['{{ "a" + none }}', ENDLESS, NAMED])
def test_lines_are_continued_where_nobody_asked_to_chat(
    tmp_path: Path, template: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_template, "_LONGEST_SECONDS", 0.2)
    artifact = with_tokenizer(tmp_path / "a", tokenizer(chat_template=template).save_pretrained)
    lines_on_standard_input(monkeypatch, b"hi\nho\n")
    engine = said(artifact, [33, 34], max_new_tokens=2)
    assert [order.prompts for order in engine.requests] == [[[71, 72]], [[71, 78]]]
    assert len(capsys.readouterr().out.splitlines()) == 2
    # A default that is missing is nobody's mistake.
    assert len(engine.notes) == (template is not NAMED)
    lines_on_standard_input(monkeypatch, b"hi\n")
    with pytest.raises(UsageError, match="chat template"):
        said(artifact, [33, 34], chat=True)


def test_prompts_do_not_need_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = with_tokenizer(tmp_path / "a", tokenizer(chat_template='{{ "a" + none }}').save_pretrained)
    assert said(artifact, [33], prompt=["hi"]).notes == []
    assert capsys.readouterr().out == "B\n"
    with pytest.raises(UsageError, match="cannot be rendered: TypeError"):
        said(artifact, [33], prompt=["hi"], chat=True)


@pytest.mark.parametrize("more", [{"prompt": ["a"]}, {"chat": False}, {"input_ids": ["1"]}])
def test_a_name_without_a_chat(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--chat-template needs --chat"):
        RunOptions(artifact=tmp_path, chat_template="rag", **more).check()
