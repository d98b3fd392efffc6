"""Check that opening a `torch.export` archive runs no code of the archive's own.

`torch.export.load` opens several kinds of entries without restriction, and evaluates some texts as Python:

- `data/sample_inputs/*.pt`: restricted unpickling first, then *unrestricted* if that fails
- weights and constants marked `use_pickle`, script and opaque objects, `.pt` files of older archives: unpickled
- `data/aotinductor/`: machine code
- symbolic sizes in `models/*.json`: given to `sympy.sympify`, which calls `eval`
- targets of calls there: any attribute of torch, of its submodules and of what they import
- names of values there: become names in generated Python, where anything else would be code
- serialized structures (pytrees): import the modules that they name

So every one of them is inspected first. What is left, ATen ops and raw tensor bytes, is data.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from kraken_compiler import _torch_compat as compat
from kraken_compiler.capture.quiet import quiet_torch
from kraken_compiler.errors import InputFileError, first_line
from kraken_compiler.ops.structure_safety import FILE_OPS, MODULES_ALLOWED, is_value_name, items_of, structure_modules

# ASCII only: Python takes look-alike letters in a name for the plain ones, a check by spelling would not.
_QUOTED_NAME = re.compile(r"\b(Symbol|Float)\s*\(\s*'[\w.+-]*'", re.ASCII)
_PLAIN_TEXT = re.compile(r"[\w\s+\-*/%(),.<>=!&|~]*", re.ASCII)
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\(", re.ASCII)
_ATTRIBUTE_OR_CALLED_RESULT = re.compile(r"\)\s*\(|\.\s*[A-Za-z_]|[A-Za-z_)]\w*\s*\.", re.ASCII)
_OP = re.compile(r"torch\.ops\.[A-Za-z_]\w*\.([A-Za-z_]\w*)(?:\.\w+)?", re.ASCII)
_UNDERSCORED_OPS = frozenset(
    f"__{inplace}{name}__" for inplace in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift")
)
"""Ops that ATen names like Python's operators; any other name with two underscores is an attribute of Python's own."""
_SCALAR_OP = re.compile(
    r"torch\.(sym_\w+|_sym_\w+)|math\.\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|index|"
    r"eq|ne|lt|le|gt|ge|not_|and_|or_|xor|lshift|rshift)",
    re.ASCII,
)
_FUNCTIONS = """
    Abs Add And CeilDiv CeilToInt CleanDiv Eq Equality FloatPow FloatTrueDiv Float FloorDiv FloorToInt Ge GreaterThan
    Gt Identity IntTrueDiv Integer IsNonOverlappingAndDenseIndicator LShift Le LessThan Lt Max Min Mod ModularIndexing
    Mul Ne Not Or Piecewise Pow PowByNatural PythonMod RShift Rational RoundDecimal RoundToInt StrictGreaterThan
    StrictLessThan Symbol ToFloat TruncToFloat TruncToInt Unequality Where ceiling floor sqrt
"""
_KNOWN_FUNCTIONS = frozenset(_FUNCTIONS.split())


def inspect_archive(file: IO[bytes], path: Path, *, trust_pickle: bool) -> tuple[str, ...]:
    """Look through an archive without opening anything that could run code.

    Args:
        file: The archive.
        path: Its path, for messages.
        trust_pickle: Let dangerous entries pass.

    Returns:
        Modules of transformers whose classes the model takes or returns.

    Raises:
        InputFileError: It is damaged; or it needs trust and has none.
    """
    modules: set[str] = set()
    try:
        for name, read in compat.read_archive_entries(file):
            danger = next(_dangers(name, read, modules), None)
            if danger is not None and not trust_pickle:
                raise InputFileError(
                    f"{path} cannot be opened safely: {danger} ({name}). Export the model again without it, "
                    "or pass --trust-pickle if you trust where the file comes from"
                )
    except (RuntimeError, OSError, ValueError, AttributeError, TypeError, KeyError, EOFError) as error:
        # The first sentence; torch's reader goes on about its own library.
        reason = first_line(error).partition(". ")[0]
        raise InputFileError(f"{path} is truncated or damaged: {reason}") from error
    return tuple(sorted(modules))


def _dangers(name: str, read: Callable[[], bytes], modules: set[str]) -> Iterator[str]:
    """Reasons why an entry could run code; collects the modules of known classes on the way."""
    if name.startswith("data/aotinductor/"):
        yield "it holds machine code"
    elif name.startswith("data/sample_inputs/"):
        if not _is_plain_pickle(read()):
            yield "its sample inputs are a pickle that runs code"
    elif name.startswith(("data/weights/", "data/constants/")):
        if name.endswith(".pt"):
            yield "it holds a pickled object"
        elif name.endswith(".json") and _marks_pickle(json.loads(read())):
            yield "some of its tensors or objects are pickled"
    elif name.startswith("models/"):
        model = json.loads(read())
        yield from (f"a size in it is no arithmetic, {text[:60]!r}" for text in _bad_sizes(model))
        yield from (f"a value in it has a name that is none, {text[:60]!r}" for text in _bad_names(model))
        yield from (f"it calls {text[:60]!r}" for text in _bad_targets(model))
        for module, imported_by_torch in structure_modules(model):
            if imported_by_torch and module.partition(".")[0] not in MODULES_ALLOWED:
                yield f"it imports the module {module!r}"
            elif module.startswith("transformers."):
                modules.add(module)


def _is_plain_pickle(content: bytes) -> bool:
    if not content:
        return True
    try:
        with quiet_torch():
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return True


def _marks_pickle(config: Any) -> bool:
    return any(
        entry.get("use_pickle") or str(entry.get("path_name")).startswith(("custom_obj", "opaque_obj"))
        for entry in config.get("config", {}).values()
    )


def _bad_sizes(value: Any) -> Iterator[str]:
    for key, item in items_of(value):
        if key == "expr_str" and not (isinstance(item, str) and _is_arithmetic(item)):
            yield str(item)
        yield from _bad_sizes(item)


def _bad_names(value: Any) -> Iterator[str]:
    """Names that are code; an argument may have none."""
    for key, item in items_of(value):
        if (
            key in ("name", "as_name")
            and item is not None
            and not (isinstance(item, str) and (not item or is_value_name(item)))
        ):
            yield str(item)
        yield from _bad_names(item)


def _bad_targets(value: Any) -> Iterator[str]:
    for _, item in items_of(value):
        if isinstance(item, dict) and "target" in item and not _is_callable_safely(item["target"]):
            yield str(item["target"])
        yield from _bad_targets(item)


def _is_callable_safely(target: Any) -> bool:
    """True for registered ops but those that open files, and for arithmetic; torch would take any attribute of its."""
    if not isinstance(target, str):
        return False
    op = _OP.fullmatch(target)
    if op is not None and op[1] in _UNDERSCORED_OPS:
        target = target.replace(op[1], "")
    if "__" in target:
        return False
    return op[1] not in FILE_OPS if op is not None else _SCALAR_OP.fullmatch(target) is not None


def _is_arithmetic(text: str) -> bool:
    """True for names, numbers, operators and calls of known functions: nothing that `eval` could be misled by."""
    text = _QUOTED_NAME.sub(r"\1(0", text)
    return (
        _PLAIN_TEXT.fullmatch(text) is not None
        and "__" not in text
        and not _ATTRIBUTE_OR_CALLED_RESULT.search(text)
        and all(function in _KNOWN_FUNCTIONS for function in _CALL.findall(text))
    )
