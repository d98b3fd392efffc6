"""Restoration of a module's state, whatever its code writes down while it runs.

Modules build tables at their first call, count calls and fill caches: in attributes, buffers, lists and dicts, in their
classes, in variables of their files, in what their functions close over. While a model is traced these are tensors
without values, which must not stay behind; what a run for comparison writes need not, either.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import functools
import gc
import queue
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kraken_compiler import _torch_compat as compat
from kraken_compiler.errors import Rejection, UnsupportedModelError

_LIBRARIES = frozenset({"torch", "numpy", "transformers", "builtins", "kraken_compiler", "pytest", "_pytest"})
"""Packages whose files' variables are not looked at: they hold no model's state, and no end of other things."""

_HOLDERS = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
    queue.Queue,
    threading.local,
)
"""Python's own classes in whose objects a model keeps what it likes."""

_MOST_BYTES = 1 << 16
"""Largest size of a tensor whose values are remembered."""

_MISSING = object()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore afterwards what a module and its code hold; the values of parameters and large tensors are not copied.

    Raises:
        UnsupportedModelError: Something without values stayed in a place that cannot be restored.
    """
    state = _State(model)
    try:
        yield
    finally:
        state.restore()
    places = _State(model).traced_since(state)
    if places:
        reason = f"its code keeps what it computed while it was traced in {places}, which cannot be restored"
        raise UnsupportedModelError([Rejection(reason, path=type(model).__name__, hint="Compute it in __init__.")])


class _State:
    """Everything that a module and its code hold, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self._restorers: list[Callable[[], None]] = []
        self._cached_functions: list[Any] = []
        self._tensors: list[tuple[Tensor, str]] = []
        self._seen: set[int] = set()
        self._references: list[Any] = []  # so that no id is given to another object meanwhile
        waiting: deque[tuple[Any, str]] = deque([(model, type(model).__name__)])
        while waiting:
            value, place = waiting.popleft()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._references.append(value)
                waiting.extend(self._look(value, place))

    def restore(self) -> None:
        for function in self._cached_functions:
            if any(_is_traced(part) for part in _inside(function)):
                function.cache_clear()
        for restorer in self._restorers:
            restorer()

    def traced_since(self, before: _State) -> str:
        """Places where something stayed that a trace made since then; "" if nothing did."""
        known_ids = {id(tensor) for tensor, _ in before._tensors}
        places = [place for tensor, place in self._tensors if compat.is_traced(tensor) and id(tensor) not in known_ids]
        places += [
            function.__qualname__ for function in self._cached_functions if any(map(_is_traced, _inside(function)))
        ]
        return ", ".join(places[:3])

    def _look(self, value: Any, place: str) -> list[tuple[Any, str]]:
        """Note a value's state; returns what it holds."""
        if isinstance(value, Tensor):
            self._tensors.append((value, place))
            self._keep_values(value)
            tensor_attributes = getattr(value, "__dict__", None)
            return (
                self._keep_dict(tensor_attributes, place) if tensor_attributes and not compat.is_traced(value) else []
            )
        if isinstance(value, dict):
            return self._keep_dict(value, place)
        if isinstance(value, list | set | deque):
            return self._keep_items(value, place)
        if isinstance(value, tuple | frozenset):
            return [(item, place) for item in value]
        if isinstance(value, functools.partial):
            return [(value.func, place), (value.args, place), (value.keywords, place)]
        if isinstance(value, types.MethodType):
            return [(value.__self__, place), (value.__func__, place)]
        if isinstance(value, types.FunctionType):
            return self._look_at_function(value, place)
        if callable(value) and hasattr(value, "cache_clear") and hasattr(value, "__wrapped__"):
            self._cached_functions.append(value)
            return [(value.__wrapped__, place)]
        if isinstance(value, type):
            return self._keep_attributes(value, dict(vars(value)), place) if _is_foreign(value) else []
        if isinstance(value, property | staticmethod | classmethod):
            inner = value.fget if isinstance(value, property) else value.__func__
            return [(inner, place)]
        if isinstance(value, contextvars.ContextVar):
            return self._keep_variable(value)
        if isinstance(value, types.ModuleType) or _is_plain(value) or _is_internal(value):
            return []
        attributes = getattr(value, "__dict__", None)
        parts: list[tuple[Any, str]] = [(one, place) for one in type(value).__mro__]
        parts += self._keep_slots(value, place)
        return parts + (self._keep_dict(attributes, place) if isinstance(attributes, dict) else [])

    def _keep_values(self, tensor: Tensor) -> None:
        """Keep the values of small tensors that are no parameters: counters and running sums, written in place."""
        is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not compat.is_fake(tensor)
        if not is_plain or tensor.numel() * tensor.element_size() > _MOST_BYTES:
            return
        with torch.no_grad():
            saved = tensor.detach().clone()

        def restore() -> None:
            with torch.no_grad():
                if not torch.equal(tensor, saved):
                    tensor.detach().copy_(saved)

        self._restorers.append(restore)

    def _keep_slots(self, owner: Any, place: str) -> list[tuple[Any, str]]:
        saved = {name: getattr(owner, name, _MISSING) for name in _slots(type(owner))}

        def restore() -> None:
            for name, before in saved.items():
                if getattr(owner, name, _MISSING) is before:
                    continue
                # Past what a class makes of assignments to its objects.
                if before is _MISSING:
                    object.__delattr__(owner, name)
                else:
                    object.__setattr__(owner, name, before)

        self._restorers.append(restore)
        return [(item, f"{place}.{name}") for name, item in saved.items() if item is not _MISSING]

    def _keep_variable(self, variable: contextvars.ContextVar[Any]) -> list[tuple[Any, str]]:
        try:
            saved = variable.get()
        except LookupError:
            return []  # what is set cannot be unset but by who has set it
        token = variable.set(saved)
        self._restorers.append(lambda: variable.reset(token))
        return [(saved, variable.name)]

    def _keep_dict(self, mapping: dict[Any, Any], place: str) -> list[tuple[Any, str]]:
        # The items themselves: a dict of its own class may make something else of them when it is asked.
        saved = dict(dict.items(mapping))

        def restore() -> None:
            if not _same(dict.items(mapping), saved.items()):
                mapping.clear()
                mapping.update(saved)

        self._restorers.append(restore)
        inner = ("_parameters", "_buffers", "_modules")
        entries = ((str(key) if isinstance(key, str | int) else "...", item) for key, item in saved.items())
        return [(item, place if key in inner else f"{place}.{key}") for key, item in entries]

    def _keep_items(self, container: Any, place: str) -> list[tuple[Any, str]]:
        saved = list(container)

        def restore() -> None:
            if len(container) != len(saved) or any(now is not then for now, then in zip(container, saved)):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(saved)

        self._restorers.append(restore)
        return [(item, place) for item in saved]

    def _keep_attributes(
        self, owner: Any, saved: dict[str, Any], place: str, *, only_traced: bool = False
    ) -> list[tuple[Any, str]]:
        """Keep the attributes of a class or a file: name by name, because they cannot be emptied."""

        def restore() -> None:
            now = dict(vars(owner))
            for name in now.keys() | saved.keys():
                before = saved.get(name, _MISSING)
                if now.get(name, _MISSING) is before or name.startswith("__"):
                    continue
                if only_traced and not _holds_traced(now.get(name)):
                    continue
                if before is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

        self._restorers.append(restore)
        return [(item, f"{place}.{name}") for name, item in saved.items() if not name.startswith("__")]

    def _look_at_function(self, function: types.FunctionType, place: str) -> list[tuple[Any, str]]:
        parts: list[tuple[Any, str]] = [(function.__dict__, place), (function.__defaults__, place)]
        parts.append((function.__kwdefaults__, place))
        for cell in function.__closure__ or ():
            parts += self._keep_cell(cell, f"what {function.__qualname__} closes over")
        file = sys.modules.get(function.__module__ or "")
        if file is not None and id(file) not in self._seen and not _is_library(function.__module__):
            self._seen.add(id(file))
            # Classes and functions in the file: only those that the model uses, which are found by themselves.
            variables = {name: value for name, value in vars(file).items() if not name.startswith("__")}
            # Other threads may be at work in a file; what has nothing to do with a trace is theirs.
            self._keep_attributes(file, variables, file.__name__, only_traced=True)
            container_types = (dict, list, set, deque, Tensor, tuple)
            containers = {
                name: value
                for name, value in variables.items()
                if isinstance(value, container_types) or hasattr(value, "cache_clear")
            }
            parts += [(value, f"{file.__name__}.{name}") for name, value in containers.items()]
        return parts + [(value, place) for value in _referenced_values(function)]

    def _keep_cell(self, cell: types.CellType, place: str) -> list[tuple[Any, str]]:
        saved = _content(cell)

        def restore() -> None:
            if _content(cell) is saved:
                return
            if saved is _MISSING:
                del cell.cell_contents
            else:
                cell.cell_contents = saved

        self._restorers.append(restore)
        return [] if saved is _MISSING else [(saved, place)]


def _referenced_values(function: types.FunctionType) -> Iterator[Any]:
    """Values that a function's code names in its file, and in the files it names: `tables.of(x)` names `tables.of`."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    files, seen = deque[dict[str, Any]]([function.__globals__]), set[int]()
    while files:
        variables = files.popleft()
        for value in [variables[name] for name in names if name in variables]:
            if not isinstance(value, types.ModuleType):
                if not isinstance(value, types.FunctionType | type) or _is_foreign(value):
                    yield value
            elif id(value) not in seen and not _is_library(value.__name__):
                seen.add(id(value))
                files.append(vars(value))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


def _same(now: Any, then: Any) -> bool:
    pairs = list(zip(now, then))
    return len(now) == len(then) == len(pairs) and all(a is c and b is d for (a, b), (c, d) in pairs)


def _is_traced(value: Any) -> bool:
    return isinstance(value, Tensor) and compat.is_traced(value)


def _holds_traced(value: Any) -> bool:
    return _is_traced(value) or (isinstance(value, dict | list | tuple | set) and any(map(_is_traced, _inside(value))))


def _inside(function: Any) -> Iterator[Any]:
    """The objects that a function remembers of its calls, or a container holds, and those in them."""
    waiting, seen = deque([function]), {id(function)}
    while waiting:
        for part in gc.get_referents(waiting.popleft()):
            if id(part) in seen or isinstance(part, type | types.ModuleType | types.FunctionType):
                continue
            seen.add(id(part))
            yield part
            if isinstance(part, dict | list | tuple | set):
                waiting.append(part)


def _slots(kind: type) -> Iterator[str]:
    for one in kind.__mro__:
        names = vars(one).get("__slots__", ())
        yield from (name for name in ([names] if isinstance(names, str) else names) if not name.startswith("__"))


def _is_foreign(value: Any) -> bool:
    """True for what belongs neither to Python nor to a library whose state is its own."""
    return not _is_library(getattr(value, "__module__", None) or "builtins")


def _is_library(module: str) -> bool:
    top = module.partition(".")[0]
    return (top in _LIBRARIES or top in sys.stdlib_module_names) and top != "__main__"


def _is_internal(value: Any) -> bool:
    """True for a part of torch or Python that has no business with a model's own state."""
    top = type(value).__module__.partition(".")[0]
    return (
        not isinstance(value, (nn.Module, *_HOLDERS)) and top != "transformers" and _is_library(type(value).__module__)
    )


def _is_plain(value: Any) -> bool:
    """True for numbers, texts and what else holds nothing."""
    plain_types = (str, bytes, int, float, complex, torch.dtype, torch.device, types.BuiltinFunctionType)
    return value is None or isinstance(value, plain_types)
