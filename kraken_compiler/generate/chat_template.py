"""A tokenizer's chat template: which one is used, and what is wrong with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kraken_compiler.errors import UsageError, first_line, missing_packages

_DEFAULT = "default"
_LONGEST_SECONDS = 5.0

Message = Mapping[str, str]
"""One message of a chat: `{"role": "user", "content": "..."}`."""


class ChatTemplate:
    """The template that writes a chat as text. It is a program in a file of the model's: it may fail in any way."""

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """Choose a template.

        Args:
            tokenizer: A `transformers.PreTrainedTokenizerBase`.
            name: Which of several; None takes the default.

        Raises:
            UsageError: There is none of that name.
        """
        self._tokenizer = tokenizer
        chat_template = getattr(tokenizer, "chat_template", None) or {}
        templates = chat_template if isinstance(chat_template, dict) else {_DEFAULT: chat_template}
        self._names = sorted(map(str, templates))
        if name is not None and name not in self._names:
            has = f"choose from {', '.join(self._names)}" if self._names else "the tokenizer has none"
            raise UsageError(f"--chat-template {name}: there is no such chat template; {has}")
        self._template = templates.get(name or _DEFAULT)

    @property
    def is_there(self) -> bool:
        """True if there is a template to use."""
        return bool(self._template)

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """A chat as text.

        Args:
            messages: The messages so far.
            answering: End where the next answer begins.

        Raises:
            UsageError: There is no template, it cannot be rendered with these messages, or a package that reads it is
                not installed.
        """
        if not self._names:
            raise UsageError("the tokenizer has no chat template; leave --chat out")
        if not self._template:
            raise UsageError(
                f"the tokenizer has no default chat template; choose one with --chat-template: {', '.join(self._names)}"
            )
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise missing_packages("reading the chat template", error) from error
        try:
            with _time_limit(_LONGEST_SECONDS):
                text: object = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=answering,
                )
                assert isinstance(text, str)
                return text
        except ImportError as error:
            raise missing_packages("reading the chat template", error) from error
        except TemplateError as error:
            raise UsageError(f"the chat template does not take these messages: {first_line(error)}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"the chat template cannot be rendered: {reason}; leave --chat out") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End Python code that runs for too long; only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler)
