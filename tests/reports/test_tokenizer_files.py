"""Tokenizers that cannot be used are found before anything expensive, in one line; a text never reaches a lookup."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.artifact.tokenizer_files import read_tokenizer
from kraken_compiler.capture.captured_model import TokenizerSource
from kraken_compiler.errors import InputFileError
from tests.reports.text_functions import with_tokenizer
from tests.test_cli_compile import files_in, refused, save_model, save_tokenizer
from tests.test_runtime_text import tokenizer

pytestmark = pytest.mark.slow

Change = Callable[[dict[str, Any]], object]

DAMAGES: dict[str, tuple[str, Change, str]] = {
    "newer": (
        "tokenizer.json",
        lambda t: t["model"].update(type="BPE2"),
        "a newer tokenizers package may know its kind",
    ),
    "no model": ("tokenizer.json", lambda t: t.pop("model"), "the tokenizer cannot be loaded"),
    "model of another kind": ("tokenizer.json", lambda t: t.update(model=[]), "the tokenizer cannot be loaded"),
    "decoder": ("tokenizer.json", lambda t: t.update(decoder={"type": "Sideways"}), "the tokenizer cannot be loaded"),
    "added tokens": ("tokenizer.json", lambda t: t.update(added_tokens=[{"id": "x"}]), "cannot be loaded"),
    "added tokens, no list": ("tokenizer.json", lambda t: t.update(added_tokens=3), "cannot be loaded"),
    "eos is a number": (
        "tokenizer_config.json",
        lambda t: t.update(eos_token=17),
        "TypeError: Special token eos_token",
    ),
    "pad is a list": ("tokenizer_config.json", lambda t: t.update(pad_token=["a"]), "cannot be loaded"),
    "class": ("tokenizer_config.json", lambda t: t.update(tokenizer_class=3), "cannot be loaded"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sound")
    tokenizer().save_pretrained(place)
    return place


def damaged(sound: Path, place: Path, name: str) -> Path:
    file, change, _ = DAMAGES[name]
    shutil.copytree(sound, place, dirs_exist_ok=True)
    content = json.loads((place / file).read_text())
    change(content)
    (place / file).write_text(json.dumps(content))
    return place


def reason_of(directory: Path) -> str:
    with pytest.raises(InputFileError) as caught:
        TokenizerSource(str(directory)).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(sound: Path, tmp_path: Path, name: str) -> None:
    reason = reason_of(damaged(sound, tmp_path / "m", name))
    assert reason.startswith(f"{tmp_path / 'm'}: the tokenizer cannot be loaded: ")
    assert DAMAGES[name][2] in reason


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[]", b"{", b"17", b"\xff\xfe{", b"", b"null"])
def test_files_that_are_something_else(sound: Path, tmp_path: Path, file: str, content: bytes) -> None:
    """Whatever the libraries raise, and what they accept can be saved."""
    place = tmp_path / "m"
    shutil.copytree(sound, place)
    (place / file).write_bytes(content)
    # What is no object holds no tokenizer; some libraries pass over what they can do without.
    if file == "tokenizer.json" and content != b"":
        assert "the tokenizer cannot be loaded" in reason_of(place)
    else:
        with suppress(InputFileError):
            TokenizerSource(str(place)).check()


def test_a_panic_of_the_library_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rust code that panics raises no Exception; an interrupt is none of a tokenizer's faults."""
    import transformers

    panic = type("PanicException", (BaseException,), {})

    def fail(kind: type[BaseException]) -> Any:
        def load(*given: Any, **named: Any) -> None:
            raise kind("index out of bounds\nstack")

        return load

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail(panic))
    with pytest.raises(InputFileError, match=r"cannot be loaded: PanicException: index out of bounds$"):
        read_tokenizer(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("name", ["newer", "eos is a number"])
def test_before_the_weights(
    llama: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, plan: bool
) -> None:
    """A compile and a plan end with one line, and no lane is made before."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    damaged(llama, model, name)
    monkeypatch.setattr("kraken_compiler.commands.rewriting.stages", None)
    options = ["--plan"] if plan else ["-o", tmp_path / "out"]
    line = refused(5, model, "--degree", "2", *options, watched=tmp_path)
    assert "the tokenizer cannot be loaded" in line
    assert not (tmp_path / "out").exists()


def test_another_model_s_tokenizer(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that makes tokens of plain text which the model does not know is no tokenizer of this model."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    tokenizer().save_pretrained(model)  # of 259 tokens, of which plain text has some beyond the model's 97
    monkeypatch.setattr("kraken_compiler.commands.rewriting.stages", None)
    line = refused(5, model, "--degree", "2", "-o", tmp_path / "out")
    assert "the model knows 0 to 96: they do not belong together" in line


def test_a_token_more_than_the_model_has(llama: Path, tmp_path: Path) -> None:
    """Some models ship with tokens that they do not know; a text that has one is refused by name."""
    from transformers import AutoTokenizer

    from kraken_compiler.capture import capture
    from kraken_compiler.commands.source_record import tokenizer_notes
    from kraken_compiler.texts.read import TextChoice, evaluation_text

    model = Path(shutil.copytree(llama, tmp_path / "model"))
    save_tokenizer(model)
    larger = AutoTokenizer.from_pretrained(model)
    larger.add_tokens(["w97"])
    larger.save_pretrained(model)
    captured = capture(model)
    (note,) = tokenizer_notes(captured)
    assert note == "the tokenizer has 98 tokens, the model knows 97; text with the others is refused"
    (tmp_path / "text").write_text("w3 w4 w97 w5")
    text = evaluation_text(captured, TextChoice(tmp_path / "text"))
    assert not isinstance(text, str)
    with pytest.raises(InputFileError, match="--text: the tokenizer makes token 97 of the text"):
        list(text)


def test_an_artifact_s_tokenizer(sound: Path, tmp_path: Path) -> None:
    """The same words where ranks read it, whoever wrote it."""
    from kraken_compiler.generate.tokenizer import TextCodec

    broken = damaged(sound, tmp_path / "m", "newer")
    artifact = with_tokenizer(tmp_path / "a", lambda place: shutil.copytree(broken, place, dirs_exist_ok=True))
    assert any(name.startswith("tokenizer/") for name in files_in(artifact.directory))
    with pytest.raises(InputFileError, match="a newer tokenizers package may know its kind"):
        TextCodec.of(artifact)


def test_a_tokenizer_of_characters() -> None:
    """Asked for a longer name, it raises; other kinds say that there is no such token."""
    from transformers import CanineTokenizer

    from kraken_compiler.generate.tokenizer import TextCodec

    codec = TextCodec(CanineTokenizer())
    ids = list(map(ord, "naïve 🎉"))
    stream = codec.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == codec.decode(ids) == "naïve 🎉"
