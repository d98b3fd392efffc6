"""An artifact's tokenizer, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.artifact.tokenizer_files import GENERATION_CONFIG, read_tokenizer, stop_tokens
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.chat_template import ChatTemplate, Message
from kraken_compiler.generate.text_stream import CleanedStream, TextStream

_MARK = "mark"
_BAD_BYTE = "<0xFF>"
"""The token of a byte that is in no character, as tokenizers with byte fallback spell it."""


class TextCodec:
    """An artifact's tokenizer.

    Attributes:
        chat: Its chat template, which may be broken or missing: that concerns chats only.
        eos: Tokens that end a text.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int] = (), template: str | None = None) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: A `transformers.PreTrainedTokenizerBase`.
            eos: Tokens that end a text beside the tokenizer's own.
            template: Name of the chat template, for a tokenizer that has several; None takes the default.

        Raises:
            UsageError: It has no template of that name.
        """
        self._tokenizer = tokenizer
        self._cleans = _cleans_up(tokenizer)
        self._bad_byte = _bad_byte(tokenizer)
        self.chat = ChatTemplate(tokenizer, template)
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos = frozenset((*own, *eos, *self._turn_end()))

    @classmethod
    def of(cls, artifact: Artifact, template: str | None = None) -> TextCodec:
        """Load an artifact's tokenizer.

        Args:
            artifact: Where it is.
            template: See the constructor.

        Raises:
            UsageError: It has none, no template of that name, or a package that reads it is not installed.
            InputFileError: A file of it is missing, truncated or tampered with.
        """
        require_tokenizer(artifact)
        artifact.verify(*artifact.tokenizer_files)
        assert artifact.tokenizer is not None
        return cls(read_tokenizer(artifact.tokenizer), sorted(noted_stop_tokens(artifact)), template)

    @property
    def can_chat(self) -> bool:
        """True if the tokenizer has a chat template to use."""
        return self.chat.is_there

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to continue."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to the point where the model answers.

        Raises:
            UsageError: The tokenizer has no chat template, it cannot be rendered with these messages, or a package that
                reads it is not installed.
        """
        text = self.chat.render(messages, answering=True)
        # The template has written the special tokens already.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._decode(ids, self._cleans)

    def stream(self, before: Sequence[int] = ()) -> TextStream | CleanedStream:
        """The text of tokens to come, as it grows.

        Args:
            before: Tokens that it continues.
        """
        stream = TextStream(lambda ids: self._decode(ids, False), before, self._bad_byte)
        return CleanedStream(stream, self._tokenizer.clean_up_tokenization) if self._cleans else stream

    def _decode(self, ids: Sequence[int], clean: bool) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=clean)
        return text

    def _turn_end(self) -> tuple[int, ...]:
        """The special token that the chat template writes after an answer: not every tokenizer names it as its EOS."""
        if not self.can_chat:
            return ()
        messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        try:
            _, _, tail = self.chat.render(messages, answering=False).rpartition(_MARK)
        except UsageError:
            # Whoever chats is told; others need no template.
            return ()
        ids: list[int] = self._tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
        return tuple(ids[:1]) if ids and ids[0] in self._special else ()

    @property
    def _special(self) -> set[int]:
        added_tokens = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {*self._tokenizer.all_special_ids, *(token for token, entry in added_tokens.items() if entry.special)}


def require_tokenizer(artifact: Artifact) -> None:
    """Make sure that an artifact understands text.

    Raises:
        UsageError: It has no tokenizer.
    """
    if artifact.tokenizer is None:
        raise UsageError(f"{artifact.directory} has no tokenizer; give token ids with --input-ids 1,2,3")


def noted_stop_tokens(artifact: Artifact) -> frozenset[int]:
    """The tokens that end a text, as far as an artifact notes them: no tokenizer is loaded.

    Raises:
        InputFileError: A file of it is missing, truncated or tampered with.
    """
    if artifact.manifest.source.stop_tokens is not None:
        return frozenset(artifact.manifest.source.stop_tokens)
    # Older versions noted what a generation config says only, and that beside a tokenizer.
    name = next((name for name in artifact.tokenizer_files if name.endswith(f"/{GENERATION_CONFIG}")), None)
    if name is None:
        return frozenset()
    artifact.verify(name)
    return frozenset(stop_tokens(artifact.path(name)))


def _cleans_up(tokenizer: Any) -> bool:
    """True if a tokenizer takes spaces before punctuation out of what it has decoded: transformers' own rule."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return True
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False))


def _bad_byte(tokenizer: Any) -> int | None:
    try:
        token = tokenizer.convert_tokens_to_ids(_BAD_BYTE)
    except ValueError:
        return None  # a tokenizer of characters: no token has a longer name
    return token if isinstance(token, int) and tokenizer.decode([token]) == "\ufffd" else None
