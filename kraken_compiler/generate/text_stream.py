"""Text that grows token by token and is, put together, what the tokenizer makes of all tokens.

Nothing is asked of a tokenizer but to decode. What a token means depends on its neighbours: bytes of one character are
spread over tokens, spaces are written between two words only, and where a character is spelled in byte tokens (byte
fallback), one bad byte turns the whole run of bytes around it into replacement characters, those before it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

_BAD = "\ufffd"
_CONTEXT_TOKENS = 6
_EAGER_TOKENS = 24
"""Tokens without certain text up to which every new one is looked at; then ever fewer, or long runs would be slow."""

_CLEANED_CHARACTERS = " .?!,'ntmsver"
"""All that is in what transformers replaces, such as " ." and " n't": no replacement reaches over any other."""

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""


class _Kind(Enum):
    """Effect of a token on the text before it."""

    SILENT = auto()  # it has no text, as a special token
    OPEN = auto()  # it holds bytes of a character, or one that others can take back
    CLOSED = auto()  # all before it, and itself, is certain


class TextStream:
    """Text that grows token by token; what later tokens could still change is held back."""

    def __init__(self, decode: Decode, before: Sequence[int] = (), bad_byte: int | None = None) -> None:
        """Begin a text.

        Args:
            decode: Token ids -> text.
            before: Tokens that the text continues. Some tokenizers write a space only between two tokens.
            bad_byte: A token that stands for a byte with which no character goes on; None looks out for one.
        """
        self._decode = decode
        self._bad_byte = bad_byte
        self._kinds: dict[int, _Kind] = {}
        self._ids = self._end_of(before)
        self._output = decode(self._ids)
        self._cuts: list[int] = []
        self._uncertain = 0
        self._look_at = _EAGER_TOKENS

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not before."""
        kind = self._kind(token)
        self._ids.append(token)
        self._uncertain += 1
        if kind is not _Kind.CLOSED and _EAGER_TOKENS < self._uncertain < self._look_at:
            return ""
        self._look_at = 2 * self._uncertain
        text = self._decode(self._ids)
        certain = text if kind is _Kind.CLOSED else self._certain(text)
        piece = self._new_output(certain)
        if certain == text and kind is not _Kind.SILENT:
            self._uncertain = 0
            self._cuts.append(len(self._ids))
            self._shorten()
        return piece

    def finish(self) -> str:
        """The rest of the text."""
        return self._new_output(self._decode(self._ids))

    def _new_output(self, text: str) -> str:
        """The part of a text that was not given out yet."""
        if self._output.startswith(text):
            return ""
        # A character that the tokens before left incomplete begins where the two texts differ.
        piece = text[len(_common(self._output, text)) :]
        self._output = text
        return piece

    def _certain(self, text: str) -> str:
        """The part of a text that no token to come can change."""
        if self._bad_byte is not None:
            text = _common(text, self._decode([*self._ids, self._bad_byte]))
        return text.rstrip(_BAD)

    def _shorten(self) -> None:
        """Forget what has no influence on what follows, so that a long text does not get slower."""
        if len(self._ids) < 4 * _CONTEXT_TOKENS:
            return
        for cut in reversed(self._cuts):
            # A context of which nothing is seen does not tell the tokenizer that a text has begun.
            if cut <= len(self._ids) - _CONTEXT_TOKENS and (context := self._decode(self._ids[cut:])):
                self._output = context
                self._ids = self._ids[cut:]
                self._cuts = [later - cut for later in self._cuts if later > cut]
                return

    def _end_of(self, ids: Sequence[int]) -> list[int]:
        """The last tokens, from behind one that ends with a whole character."""
        begin = len(ids) - _CONTEXT_TOKENS
        while begin > 0 and not (self._kind(ids[begin - 1]) is _Kind.CLOSED and self._decode(ids[begin:])):
            begin -= 1
        return list(ids[max(begin, 0) :])

    def _kind(self, token: int) -> _Kind:
        if token not in self._kinds:
            if self._bad_byte is None and self._decode([token]) == _BAD:
                self._bad_byte = token
                self._kinds.clear()
            self._kinds[token] = self._find_kind(token)
        return self._kinds[token]

    def _find_kind(self, token: int) -> _Kind:
        # Twice, as some tokenizers take a space from the beginning of a text.
        twice = self._decode([token, token])
        if not twice:
            return _Kind.SILENT
        if _BAD in twice:
            return _Kind.OPEN
        stays = self._bad_byte is None or self._decode([token, token, self._bad_byte]).startswith(twice)
        return _Kind.CLOSED if stays else _Kind.OPEN


class CleanedStream:
    """A stream without spaces before punctuation, which the tokenizer takes out (in transformers: cleans up)."""

    def __init__(self, stream: TextStream, clean: Callable[[str], str]) -> None:
        """Begin a text.

        Args:
            stream: The text as it is decoded.
            clean: Takes such spaces out of a text.
        """
        self._stream = stream
        self._clean = clean
        self._pending = ""

    def push(self, token: int) -> str:
        """See `TextStream.push`."""
        piece = self._stream.push(token)
        tail = len(piece) - len(piece.rstrip(_CLEANED_CHARACTERS))
        self._pending += piece
        if tail == len(piece):
            return ""
        whole, self._pending = self._pending[: len(self._pending) - tail], self._pending[len(self._pending) - tail :]
        return self._clean(whole)

    def finish(self) -> str:
        """See `TextStream.finish`."""
        rest, self._pending = self._pending + self._stream.finish(), ""
        return self._clean(rest)


def _common(one: str, other: str) -> str:
    """The common beginning of two texts."""
    differing = (index for index, (left, right) in enumerate(zip(one, other)) if left != right)
    return one[: next(differing, min(len(one), len(other)))]
