"""Checks of a file's texts that could make torch run or import something. Imports no torch.

Names of values become names in Python source that torch writes and runs. Restoring a serialized structure (a pytree of
`torch.utils._pytree`) imports the modules that it names, and a module may be any file that Python finds.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Iterator
from typing import Any

MODULES_ALLOWED = ("builtins", "collections", "torch", "transformers")
"""Packages that a serialized structure may import; importing them runs nothing of the file's."""

FILE_OPS = frozenset({"from_file"})
"""Ops of torch's own that open files."""


def is_value_name(text: str) -> bool:
    """True for what stays a name in Python source: anything else there would be code."""
    return text.isidentifier() and not keyword.iskeyword(text)


def require_safe_structure(text: str) -> None:
    """Make sure that restoring a serialized structure runs nothing of the file's.

    Raises:
        ValueError: It is no JSON, or it would import a module outside of `MODULES_ALLOWED`.
    """
    try:
        modules = list(structure_modules(json.loads(text)))
    except RecursionError:
        raise ValueError("a structure in it is nested too deeply") from None
    for module, imported_by_torch in modules:
        if imported_by_torch and module.partition(".")[0] not in MODULES_ALLOWED:
            raise ValueError(f"it imports the module {module!r}")


def structure_modules(value: Any) -> Iterator[tuple[str, bool]]:
    """Modules named by serialized pytrees, and whether torch imports them.

    Pytrees are JSON texts inside the JSON, with more JSON texts inside.
    """
    for key, item in items_of(value):
        if not isinstance(item, str):
            yield from structure_modules(item)
        elif key == "type" and "." in item:
            yield item.rpartition(".")[0], False
        elif key == "default_factory_module" or (key == "fqn" and "__enum__" in value):
            yield item.partition(":")[0], True
        elif item[:1] in ("[", "{", '"'):
            try:
                structure = json.loads(item)
            except ValueError:
                continue
            yield from structure_modules({key: structure} if isinstance(structure, str) else structure)


def items_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The members of a JSON value, with their keys if it has some."""
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        yield from (("", item) for item in value)
