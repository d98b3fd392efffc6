"""Damaged and hostile variants of small valid files, and a watch over what reading them does."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from kraken_compiler.errors import KrakenError

CANARY = "kraken_canary"
"""Name of a file that no reader may make; some of the hostile texts would, if anybody ran them."""
_TOUCH = f"__import__('pathlib').Path('{CANARY}').touch()"
_TEXTS = (
    "",
    "..",
    "/etc/passwd",
    "../../../../etc/passwd",
    "torch/../../outside",
    "\0",
    "\ud800",
    "a\nb",
    "nan",
    "9" * 5000,
    _TOUCH,
    f"x={_TOUCH}",
    f"x); {_TOUCH}; (",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.__init__.default",
    "aten.from_file.default",
    "aten.__init__.default",
    "_operator.attrgetter",
    "operator.attrgetter",
    "os.system",
    f'[1, {{"type": "collections.defaultdict", "context": "{{\\"default_factory_module\\": \\"{CANARY}\\"}}"}}]',
    "[" * 50_000,
)
_VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**30),
    0.5,
    1e308,
    [],
    {},
    [[]],
    [0, -1],
    *_TEXTS,
)

_watched: list[Path | None] = [None]
_trespasses: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    place = _watched[0]
    if place is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        name = arguments[0].decode(errors="replace") if isinstance(arguments[0], bytes) else arguments[0]
        python = name.endswith((".py", ".pyc", ".so")) or name.startswith(("/proc/self", "/dev/null", "<"))
        if not python and not Path(name).is_relative_to(place):
            _trespasses.append(f"opened {name}")
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        _trespasses.append(event)


sys.addaudithook(_audit)


@contextmanager
def watched(place: Path) -> Iterator[None]:
    """Note what the block opens outside of a directory, and what it starts; it must be nothing."""
    _trespasses.clear()
    _watched[0] = place
    try:
        yield
    finally:
        _watched[0] = None
    assert not _trespasses, _trespasses
    assert not Path(CANARY).exists()


def refused_or_read(read: Callable[[], object], place: Path) -> str | None:
    """Read a file that may be hostile; returns the one line of the refusal, None if it was read."""
    with watched(place):
        try:
            read()
        except KrakenError as error:
            message = str(error)
            assert message
            assert "\n" not in message
            return message
    return None


def json_values() -> st.SearchStrategy[Any]:
    """What takes the place of a part of a document."""
    return st.one_of(st.sampled_from(_VALUES), st.text(max_size=8), st.integers(), st.floats())


def mutated(document: Any) -> st.SearchStrategy[Any]:
    """A JSON document with one to three of its parts replaced, removed or doubled."""
    steps = st.tuples(st.lists(st.integers(0, 10**6), min_size=1, max_size=7), st.integers(0, 5), json_values())

    def build(changes: list[tuple[list[int], int, Any]]) -> Any:
        copy = json.loads(json.dumps(document))
        for path, kind, value in changes:
            _change(copy, path, kind, deepcopy(value))
        return copy

    return st.lists(steps, min_size=1, max_size=3).map(build)


def _change(document: Any, path: list[int], kind: int, value: Any) -> None:
    parent = document
    for step in path[:-1]:
        children = [child for child in _children(parent) if isinstance(child, dict | list) and child]
        if not children:
            break
        parent = children[step % len(children)]
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    if not keys:
        return
    key = keys[path[-1] % len(keys)]
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.append(parent[key])
    elif kind == 1:
        parent[value if isinstance(value, str) else "more"] = parent[key]
    else:
        parent[key] = value


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []


def mutated_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes changed, cut off, doubled or put in."""
    where = st.integers(0, len(content))
    edits = st.tuples(st.integers(0, 4), where, where, st.binary(max_size=9))

    def build(changes: list[tuple[int, int, int, bytes]]) -> bytes:
        result = content
        for kind, first, second, extra in changes:
            low, high = sorted((first, second))
            if kind == 0:
                result = result[:low]
            elif kind == 1:
                result = result[:low] + result[high:]
            elif kind == 2:
                result = result[:low] + extra + result[low:]
            elif kind == 3:
                result = result[:high] + result[low:]
            else:
                result = result[:low] + extra + result[low + len(extra) :]
        return result

    return st.lists(edits, min_size=1, max_size=3).map(build)


def rezipped(content: bytes, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with other contents; a name is what follows the archive's own folder."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w", compression) as new:
        names = [name for name in old.namelist() if name.partition("/")[2] not in changes]
        folder = old.namelist()[0].partition("/")[0]
        for name in names:
            new.writestr(name, old.read(name))
        for name, text in changes.items():
            new.writestr(f"{folder}/{name}", text)
    return result.getvalue()


def dumped(document: Any) -> bytes:
    """JSON as a hostile writer makes it: not a number and infinity are words, letters may be halves of others."""
    return json.dumps(document).encode()
