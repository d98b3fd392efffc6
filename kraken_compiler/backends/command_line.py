"""The options of all backends as parameters of a command line."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

from kraken_compiler.backends.base import AT_RUN
from kraken_compiler.backends.registry import backend_class, backend_rows, options_of


def backend_parameters(*, at_run: bool) -> dict[str, inspect.Parameter]:
    """The options of all backends, by field name; one that several have is there once.

    Args:
        at_run: Those of a run, or those of a compile.
    """
    found: dict[str, inspect.Parameter] = {}
    for name in backend_rows():
        own = options_of(name, at_run=at_run)
        for item in fields(backend_class(name).Options):
            if item.name in own:
                found.setdefault(item.name, parameter_of(item, own[item.name]))
    return found


def parameter_of(item: Field[Any], annotation: Any) -> inspect.Parameter:
    """A field of a dataclass as a parameter that typer reads."""
    default = inspect.Parameter.empty if item.default is MISSING else item.default
    if item.default_factory is not MISSING:
        default = item.default_factory()
    if AT_RUN in getattr(annotation, "__metadata__", ()):
        kept = tuple(part for part in annotation.__metadata__ if part != AT_RUN)
        annotation = Annotated[(annotation.__origin__, *kept)]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def not_given_is_none(annotation: Any) -> Any:
    """A parameter's annotation that also allows None."""
    return Annotated[(annotation.__origin__ | None, *annotation.__metadata__)]
