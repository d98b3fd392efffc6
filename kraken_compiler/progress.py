"""Progress reports of long work. The command line shows them; the library is silent unless asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, int, str], None]
"""Called with (units done, units in all, name of the unit)."""


class Progress(Protocol):
    """Receiver of the stages of a compile."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A stage of unknown length."""
        ...

    def steps(self, name: str) -> AbstractContextManager[Advance]:
        """A stage that counts; the function it gives is called with how far it is."""
        ...


class Silent:
    """Receiver that shows nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    @contextmanager
    def steps(self, name: str) -> Iterator[Advance]:
        yield lambda done, total, unit: None
