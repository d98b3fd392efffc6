"""For tests of what surrounds the costly parts of a compile: those run once, and what they gave is given again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kraken_compiler.capture import Capture, capture
from kraken_compiler.verify.verification import verify_programs


class RanksOnce:
    """Stands in for `verify_programs`: starts ranks the first time, and after that returns what those showed."""

    def __init__(self) -> None:
        self._shown: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self._shown is None:
            self._shown = verify_programs(*arguments)
        return self._shown

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Whatever is compiled or verified meanwhile asks this one."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("kraken_compiler.commands.compile.verify_programs", self)
            patched.setattr("kraken_compiler.commands.verify.verify_programs", self)
            yield


class CaptureOnce:
    """Stands in for `capture`: captures a path with the same options once; nobody changes what is captured."""

    def __init__(self) -> None:
        self._known: dict[str, Capture] = {}

    def __call__(self, model: Any, **options: Any) -> Capture:
        if not isinstance(model, str | Path):
            return capture(model, **options)
        key = f"{Path(model).absolute()} {options}"
        if key not in self._known:
            self._known[key] = capture(model, **options)
        return self._known[key]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Whatever is compiled or verified meanwhile asks this one."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("kraken_compiler.commands.compile.capture", self)
            patched.setattr("kraken_compiler.commands.source.capture", self)
            yield
