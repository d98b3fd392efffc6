"""Reading of a tokenizer's files, and of the stop tokens in the files beside them. Imports no torch."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kraken_compiler.errors import InputFileError, KrakenError, missing_packages
from kraken_compiler.text import ENCODING

GENERATION_CONFIG = "generation_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_EOS = "eos_token_id"
_NESTED = ("decoder", "generator", "text_config")
"""Fields of a config of several parts that hold that of the language model, in transformers' order."""


def read_tokenizer(directory: str | Path, gguf_file: str | None = None) -> Any:
    """A tokenizer, a `transformers.PreTrainedTokenizerBase`.

    Args:
        directory: Of its files, or of the GGUF file.
        gguf_file: Name of the GGUF file that holds it, if one does.

    Raises:
        InputFileError: The files are damaged, of a kind that the installed packages do not know, or need code that is
            not part of transformers.
        UsageError: The packages that read them are not installed.
    """
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with _damage_as_input_file_error(directory, "loaded"):
        try:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **extra)
        except ImportError as error:
            raise missing_packages(f"reading the tokenizer in {directory}", error) from error


def read_without_templates(directory: Path) -> Any:
    """The tokenizer of a directory without its chat templates; None if it cannot be read without them either."""
    stripped_directory = TemporaryDirectory(prefix="kraken-tokenizer-")
    for path in directory.iterdir():
        if path.name not in _TEMPLATES:
            (Path(stripped_directory.name) / path.name).symlink_to(path.absolute())
    try:
        _drop_template(Path(stripped_directory.name) / "tokenizer_config.json")
        tokenizer = read_tokenizer(stripped_directory.name)
    except InputFileError:
        stripped_directory.cleanup()
        return None
    # Some tokenizers copy their files when they are saved.
    weakref.finalize(tokenizer, stripped_directory.cleanup)
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path, source: str) -> tuple[str, ...]:
    """Write a tokenizer's files; without chat templates if those cannot be written. Returns what a user should know.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerBase`.
        directory: An empty directory.
        source: Where it was read, for messages.

    Raises:
        InputFileError: It cannot be saved.
        OSError: The directory cannot be written.
    """
    try:
        _save(tokenizer, directory, source)
    except InputFileError as error:
        if not getattr(tokenizer, "chat_template", None):
            raise
        tokenizer.chat_template = None
        shutil.rmtree(directory)
        directory.mkdir()
        _save(tokenizer, directory, source)
        return (f"without a chat template, which is damaged: {error}",)
    return ()


def stop_tokens(path: Path) -> tuple[int, ...]:
    """The tokens that a generation config names as those that end a text.

    Raises:
        InputFileError: It is damaged.
    """
    return _ids(_object(path).get(_EOS), path)


def stop_tokens_of_model(directory: Path) -> tuple[int, ...]:
    """The tokens that a model directory's generation config names as those that end a text, else its config.

    Raises:
        InputFileError: A file is damaged.
    """
    return _ids((generation_config(directory) or {}).get(_EOS), directory)


def generation_config(directory: Path, *, of_config: bool = True) -> dict[str, Any] | None:
    """The generation config of a model directory; None if it needs none.

    Args:
        directory: The directory.
        of_config: Where no generation config names stop tokens, put those into it that the model's config names, as
            transformers does when it generates.

    Raises:
        InputFileError: A file is damaged.
    """
    own_path, model_path = directory / GENERATION_CONFIG, directory / "config.json"
    settings = _object(own_path) if own_path.is_file() else None
    if not of_config or (settings is not None and _ids(settings.get(_EOS), own_path)):
        return settings
    config = _object(model_path) if model_path.is_file() else {}
    eos = eos_in_config(config)
    return {**(settings or {}), _EOS: eos} if _ids(eos, model_path) else settings


def eos_in_config(config: Mapping[str, Any]) -> Any:
    """What a model's config, or that of its language model, names as the tokens that end a text; None if nothing."""
    parts = (config, *(config[name] for name in _NESTED if isinstance(config.get(name), dict)))
    return next((part[_EOS] for part in parts if part.get(_EOS) is not None), None)


def _save(tokenizer: Any, directory: Path, source: str) -> None:
    with _damage_as_input_file_error(source, "saved"):
        try:
            tokenizer.save_pretrained(directory)
        except OSError as error:
            failure = error
        else:
            return
    raise failure


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding=ENCODING))
    except (OSError, ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: damaged, no JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputFileError(f"{path}: damaged, no JSON object")
    return content


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(type(one) is int for one in ids):
        raise InputFileError(f"{path}: its {_EOS} is no token id")
    return ids


def _drop_template(path: Path) -> None:
    """Replace a link to a tokenizer's config by a copy that has no chat template."""
    if path.is_file():
        content = {name: value for name, value in _object(path).items() if name != "chat_template"}
        path.unlink()
        path.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def _damage_as_input_file_error(directory: str | Path, action: str) -> Iterator[None]:
    """Make an InputFileError of whatever goes wrong with a tokenizer's files.

    Python code raises what it likes over broken files, and Rust code bare exceptions and panics.
    """
    try:
        yield
    except KrakenError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first, *more = (str(error).strip() or type(error).__name__).splitlines()
        reason = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
        is_clear = isinstance(error, OSError | ValueError) or type(error) is Exception
        kind = "" if is_clear else f"{type(error).__name__}: "
        # How the Rust code says that it does not know a kind.
        newer = "; a newer tokenizers package may know its kind" if "variant of untagged enum" in reason else ""
        raise InputFileError(f"{directory}: the tokenizer cannot be {action}: {kind}{reason}{newer}") from error
