"""Text on its way in and out: bytes that are no text, what ends a line, marks, and where it cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.cli.run import run as run_command
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.generate.lines import Lines
from kraken_compiler.generate.request import RunOptions
from kraken_compiler.options.command_line import command_options
from kraken_compiler.options.command_options import merged
from kraken_compiler.options.compile import CompileOptions
from kraken_compiler.texts.read import TokenText as Text
from kraken_compiler.texts.read import _batches_of, read_text
from tests.reports.text_functions import said, with_tokenizer

MARK = b"\xef\xbb\xbf"


def options(**given: Any) -> RunOptions:
    return RunOptions(artifact=Path("a"), **given)


def prompts_in(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return options(prompt_file=path).prompts()


# in ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"one\xe2\x80\xa8line\x0conly\n", ["one\u2028line\x0conly"]),
        (b"a\x0bb\x1cc\x1dd\x1ee\n\xc2\x85f\xe2\x80\xa9g", ["a\x0bb\x1cc\x1dd\x1ee", "\x85f\u2029g"]),
        (b"a\r\nb\r\n\r\nc", ["a", "b", "c"]),
        (b"a\rb\n", ["a\rb"]),
        (MARK + b"a\nb", ["a", "b"]),
        (b"a\n" + MARK + b"b", ["a", "\ufeffb"]),
        (b"nul\x00l \n \n\t\nb ", ["nul\x00l ", "b "]),
    ],
)
def test_only_line_feeds_end_a_prompt(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    assert prompts_in(tmp_path / "p", content) == prompts


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"caf\xe9\n", r"\(line 1, byte 0xe9\)"),
        (b"ok\nok\n\xffx\n", r"\(line 3, byte 0xff\)"),
        (b"ok\nend\xc3", r"\(line 2, byte 0xc3\)"),
        (b"\xed\xa0\x80", r"\(line 1, byte 0xed\)"),
        ("ab\n".encode("utf-16"), r"\(it begins like UTF-16\)"),
    ],
)
def test_where_a_file_is_no_text(tmp_path: Path, content: bytes, place: str) -> None:
    """Prompts, texts that are read whole, and those that are read piece by piece."""
    path = tmp_path / "p"
    with pytest.raises(InputFileError, match=rf"--prompt-file: .*p is not UTF-8 text {place}"):
        prompts_in(path, content)
    with pytest.raises(InputFileError, match=rf"--calibrate: .*p is not UTF-8 text {place}"):
        read_text(path, "--calibrate")
    text = Text("p", 1, lambda text: _batches_of(text, path, lambda piece: [1] * len(piece), [], 2, None))
    with pytest.raises(InputFileError, match=rf"--text: .*p is not UTF-8 text {place}"):
        list(text)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(MARK + b"ab\r\ncd")
    assert read_text(path, "--text") == "ab\ncd"
    pieces: list[str] = []

    def tokenize(piece: str) -> list[int]:
        pieces.append(piece)
        return [1, 2]

    assert len(list(Text("t", 1, lambda text: _batches_of(text, path, tokenize, [], 2, None)))) == 1
    assert pieces == ["ab\ncd"]
    path.write_bytes(MARK + b"degree = 3")
    assert merged(command_options(CompileOptions), path, {})["degree"] == 3


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"--prompt-file: cannot read .*: Is a directory"):
        options(prompt_file=tmp_path).prompts()
    with pytest.raises(InputFileError, match="/dev/zero has more than 256 MB"):
        options(prompt_file=Path("/dev/zero")).prompts()
    with pytest.raises(UsageError, match="has no prompts"):
        prompts_in(tmp_path / "p", MARK + b"\n\r\n")


def test_a_prompt_file_that_is_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once: ranks are given what was in it."""
    artifact = with_tokenizer(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("hi\nho\n",), daemon=True).start()
    given: list[RunOptions] = []

    def launch(degree: int, arguments: list[str], **_: Any) -> None:
        given.append(RunOptions.from_json(Path(arguments[1]).read_text()))

    monkeypatch.setattr("kraken_compiler.ranks.launch.launch", launch)
    run_command(RunOptions(artifact=artifact.directory, prompt_file=tmp_path / "pipe"))
    assert [(one.prompt, one.prompt_file) for one in given] == [(["hi", "ho"], None)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ["caf\udce9"]}, r"^--prompt: not UTF-8 text \(byte 0xe9 at character 4\)$"),
        ({"prompt": ["a", "b", "\udcff"]}, r"^--prompt \(number 3\): not UTF-8 text \(byte 0xff at character 1\)$"),
        ({"prompt": ["a"], "chat": True, "system": "x\udc80"}, r"^--system: not UTF-8 text \(byte 0x80 at character 2"),
        ({"prompt": ["\ud83c"]}, r"surrogate U\+D83C at character 1"),
    ],
)
def test_bytes_on_the_command_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**given).check()


def test_bytes_on_standard_input() -> None:
    reading, writing = os.pipe()
    os.write(writing, MARK + b"one\xe2\x80\xa8\x0cline\ncaf\xe9\nnext\r\n" + MARK + b"x")
    os.close(writing)
    lines = Lines(reading)
    assert lines.poll(1) == "one\u2028\x0cline"
    with pytest.raises(UsageError, match=r"standard input: line 2 is not UTF-8 text \(byte 0xe9\)"):
        lines.poll(1)
    assert [lines.poll(1), lines.poll(1), lines.poll(1)] == ["next", "\ufeffx", None]
    os.close(reading)


# beyond what the model was made for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_tokens", "note"),
    [
        (6, ""),
        (7, "prompt and new tokens take 11 positions, the model was made for 10 (max_position_embeddings)"),
        (32, "prompt and new tokens take 36 positions, the model was made for 10 (max_position_embeddings)"),
    ],
)
def test_more_positions_than_the_model_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new_tokens: int, note: str
) -> None:
    artifact = with_tokenizer(tmp_path / "a", max_positions=10)
    engine = said(artifact, [33] * 40, prompt=["hiho"], max_new_tokens=new_tokens, json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == engine.notes
    assert len(document["notes"]) == bool(note)
    assert not note or document["notes"][0].startswith(note)
    assert len(document["results"][0]["ids"]) == new_tokens


def test_a_prompt_that_is_too_long_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = said(with_tokenizer(tmp_path / "a", max_positions=3), [33], prompt=["ok", "hiho"], max_new_tokens=1)
    (note,) = engine.notes
    assert note.startswith("the prompt takes 4 positions, the model was made for 3 (max_position_embeddings)")
    assert capsys.readouterr().out == "--- 1: ok\nB\n\n--- 2: hiho\nB\n"


@pytest.mark.parametrize("room", [None, 10, 11])
def test_a_conversation_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int | None
) -> None:
    """It has no more room than the model was made for, unless somebody asks for it."""
    reading, writing = os.pipe()
    os.write(writing, b"hiho\n")
    os.close(writing)
    monkeypatch.setattr("kraken_compiler.generate.frontend.Lines", lambda: Lines(reading))
    monkeypatch.setattr("os.isatty", lambda descriptor: False)
    engine = said(with_tokenizer(tmp_path / "a", max_positions=10), [33] * 40, max_context=room)
    assert capsys.readouterr().out == "B" * (7 if room == 11 else 6) + "\n"
    assert [note.split(":")[0] for note in engine.notes] == (
        ["there is room for 11 tokens, the model was made for 10 positions (max_position_embeddings)"] * (room == 11)
    )


def test_a_model_that_does_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = said(with_tokenizer(tmp_path / "a"), [33], prompt=["x" * 5000])
    assert engine.notes == []
    assert capsys.readouterr().out == "B\n"


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 9}, 9),
        ({"n_positions": 8}, 8),
        ({"text_config": {"max_position_embeddings": 7}}, 7),
        ({"decoder": {"max_position_embeddings": 6}}, 6),
        ({"max_position_embeddings": None, "text_config": {"n_positions": 5}}, 5),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": True}, None),
        ({"seq_length": 4}, None),
        (None, None),
    ],
)
def test_who_says_how_many(config: dict[str, Any] | None, limit: int | None) -> None:
    from kraken_compiler.commands.source_record import max_positions

    assert max_positions(config) == limit


# out -----------------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "tests.reports.text_command"]


def command(
    what: str, environment: dict[str, str] | None = None, shell: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """A command whose engine says what it is told, in a process of its own."""
    script = f"set -o pipefail; {' '.join(COMMAND)} {what} {shell}"
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, env=os.environ | (environment or {}), check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_of_another_encoding(encoding: str) -> None:
    """What it does not have is written as an escape; what it has, as it is."""
    done = command("text", {"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"na\\xefve \\u2603\n" if encoding == "ascii" else b"na\xefve \\u2603\n"
    assert command("text", {"PYTHONIOENCODING": "utf-8"}).stdout == "naïve ☃\n".encode()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["text", "lines", "json", "--help"])
def test_a_full_output(what: str) -> None:
    done = command(what, shell="> /dev/full")
    assert done.stderr == b"error: standard output: cannot be written: No space left on device\n"
    assert done.returncode == 5


@pytest.mark.slow
@pytest.mark.parametrize("what", ["text", "lines", "json"])
def test_an_output_that_is_closed(what: str) -> None:
    """A reader that has enough is no failure, and neither is nobody to read."""
    for shell in ("| true", ">&-", ">&- 2>&- <&-"):
        done = command(what, shell=shell)
        assert (done.returncode, done.stderr) == (0, b""), shell


@pytest.mark.slow
def test_errors_that_nobody_can_read() -> None:
    for shell in ("2> /dev/full", "2>&-"):
        done = command("failure", shell=shell)
        assert (done.returncode, done.stdout) == (2, b""), shell
    done = command("failure --json", shell="> /dev/full")
    assert (done.returncode, done.stderr) == (2, b"error: wrong\n")
    assert command("progress", shell="2> /dev/full").returncode == 0
