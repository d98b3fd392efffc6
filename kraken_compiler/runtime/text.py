"""Between text and token ids: the tokenizer, chat templates, and text that grows token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.errors import InputFileError, UsageError
from kraken_compiler.optional_packages import missing_packages

_CONTEXT_TOKENS = 6
_MARK = "mark"

Message = Mapping[str, str]
"""One message of a chat: `{"role": "user", "content": "..."}`."""


class TextCodec:
    """An artifact's tokenizer."""

    def __init__(self, tokenizer: Any, eos: Sequence[int] = ()) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: A `transformers.PreTrainedTokenizerBase`.
            eos: Tokens that end a text beside the tokenizer's own.
        """
        self._tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos = frozenset((*own, *eos, *self._turn_end()))

    @classmethod
    def of(cls, artifact: Artifact) -> TextCodec:
        """Load an artifact's tokenizer.

        Raises:
            UsageError: It has none, or a package that reads it is not installed.
            InputFileError: A file of it is missing, truncated or tampered with.
        """
        require_tokenizer(artifact)
        artifact.verify(*artifact.tokenizer_files)
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(artifact.tokenizer, local_files_only=True)
        except ImportError as error:
            raise missing_packages(f"reading the tokenizer in {artifact.tokenizer}", error) from error
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputFileError(f"{artifact.tokenizer}: the tokenizer cannot be loaded: {reason}") from error
        return cls(tokenizer, _generation_eos(artifact))

    @property
    def can_chat(self) -> bool:
        """True if the tokenizer has a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to continue."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to the point where the model answers.

        Raises:
            UsageError: The tokenizer has no chat template, it does not take these messages, or a package that reads it
                is not installed.
        """
        if not self.can_chat:
            raise UsageError("the tokenizer has no chat template; leave --chat out")
        text = self._render(messages, answering=True)
        # The template has written the special tokens already.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _render(self, messages: Sequence[Message], answering: bool) -> str:
        try:
            from jinja2 import TemplateError

            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answering
            )
        except ImportError as error:
            raise missing_packages("reading the chat template", error) from error
        except TemplateError as error:
            raise UsageError(f"the chat template does not take these messages: {error}") from error
        return text

    def _turn_end(self) -> tuple[int, ...]:
        """The special token that the chat template writes after an answer: not every tokenizer names it as its EOS."""
        if not self.can_chat:
            return ()
        messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        try:
            _, _, tail = self._render(messages, answering=False).rpartition(_MARK)
        except UsageError:
            return ()
        ids: list[int] = self._tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
        return tuple(ids[:1]) if ids and ids[0] in self._special else ()

    @property
    def _special(self) -> set[int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {*self._tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


class TextStream:
    """Text that grows token by token; characters of several tokens are held back until they are whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """Begin a text.

        Args:
            decode: Token ids -> text.
            before: Tokens that the text continues. Some tokenizers write a space only between two tokens.
        """
        self._decode = decode
        self._ids = list(before[-_CONTEXT_TOKENS:])
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not before."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest of the text."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and not final:
            return ""
        # Only the last tokens matter for what follows, so that a long text does not get slower.
        self._ids = self._ids[-_CONTEXT_TOKENS:]
        self._shown = len(self._ids)
        return text[len(before) :]


def require_tokenizer(artifact: Artifact) -> None:
    """Make sure that an artifact understands text.

    Raises:
        UsageError: It has no tokenizer.
    """
    if artifact.tokenizer is None:
        raise UsageError(f"{artifact.directory} has no tokenizer; give token ids with --input-ids 1,2,3")


def _generation_eos(artifact: Artifact) -> tuple[int, ...]:
    """The EOS ids of a generation config beside the tokenizer, which may be a list."""
    name = next((name for name in artifact.tokenizer_files if name.endswith("/generation_config.json")), None)
    if name is None:
        return ()
    path = artifact.path(name)
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputFileError(f"{path}: damaged, no generation config") from error
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(type(one) is int for one in ids):
        raise InputFileError(f"{path}: its eos_token_id is no token id")
    return ids
