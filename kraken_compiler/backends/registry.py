"""The table of the backends. Imports none of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.base import Backend, BackendOptions, Reference, annotations_of
from kraken_compiler.errors import InputFileError, UsageError

_OWN_ROWS = {
    "torch": "kraken_compiler.backends.torch_dist.backend:TorchBackend",
    "onnx": "kraken_compiler.backends.onnx_ort.backend:OnnxBackend",
    "vllm": "kraken_compiler.backends.vllm.backend:VllmBackend",
}
"""A row for every backend of this package; a run takes the first one that an artifact has."""

DEFAULT_BACKEND = next(iter(_OWN_ROWS))
"""The backend where nobody names one; it keeps the lanes themselves, too."""

BACKEND_NAMES = " or ".join((", ".join([*_OWN_ROWS][:-1]), [*_OWN_ROWS][-1]))
"""The names of this package's backends as text, for the help of options."""

GROUP = "kraken_compiler.backends"
"""The entry points of other packages' backends."""


@cache
def backend_rows() -> Mapping[str, str]:
    """The path of every backend's class, as MODULE:CLASS, by name."""
    others = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**_OWN_ROWS, **{name: others[name] for name in sorted(others) if name not in _OWN_ROWS}}


def backend_class(name: str) -> type[Backend[Any]]:
    """The class of the backend called `name`.

    Raises:
        UsageError: There is none; names the nearest.
    """
    rows = backend_rows()
    if name not in rows:
        nearest = difflib.get_close_matches(name, rows, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise UsageError(f"unknown backend '{name}' (known: {', '.join(rows)}){hint}")
    module, _, attribute = rows[name].partition(":")
    kind: type[Backend[Any]] = getattr(import_module(module), attribute)
    return kind


def backend_named(name: str, options: Mapping[str, Any] | None = None) -> Backend[Any]:
    """The backend called `name`.

    Args:
        name: Its name.
        options: Those of its options that were chosen, by field name.

    Raises:
        UsageError: There is none, or an option has no such value.
    """
    kind = backend_class(name)
    settings: BackendOptions = kind.Options(**(options or {}))
    settings.check()
    return kind(settings)


def chosen_backends(names: Sequence[str], options: Mapping[str, Any]) -> list[Backend[Any]]:
    """The backends that are to write programs, each once.

    Args:
        names: Their names.
        options: What was chosen of all of them, by field name; every backend takes its own.

    Raises:
        UsageError: There is no such backend or none at all, an option is none of theirs or has no such value.
    """
    unique_names = dict.fromkeys([names] if isinstance(names, str) else names)
    if not unique_names:
        raise UsageError(f"no backend is named that writes programs; give at least one of {', '.join(backend_rows())}")
    own_options = {name: options_of(name, at_run=False) for name in unique_names}
    for option, value in options.items():
        if any(option in known_options for known_options in own_options.values()):
            continue
        owners = [name for name in backend_rows() if option in options_of(name, at_run=False)]
        flag = f"--{option.replace('_', '-')}"
        if not owners:
            raise UsageError(f"there is no option {flag}")
        raise UsageError(f"{flag} {value} is an option of the {owners[0]} backend; add --backend {owners[0]}")
    return [
        backend_named(name, {key: options[key] for key in known_options if key in options})
        for name, known_options in own_options.items()
    ]


def backends_of(artifact: Artifact, run_options: Mapping[str, Any] | None = None) -> list[Backend[Any]]:
    """The backends that wrote an artifact, with the options that they were given.

    Args:
        artifact: The artifact.
        run_options: Options of a run, by field name; every backend takes its own.

    Raises:
        InputFileError: The artifact was written by a backend that is not here, or with options that are not its own.
        UsageError: An option has no such value.
    """
    backends = []
    for name, compile_options in artifact.manifest.backends.items():
        try:
            known_options = options_of(name, at_run=False)
            run_values = {
                key: value for key, value in (run_options or {}).items() if key in options_of(name, at_run=True)
            }
        except UsageError as error:
            raise InputFileError(f"{artifact.directory}: {error}") from error
        if not compile_options.keys() <= known_options.keys():
            unknown_options = ", ".join(sorted(compile_options.keys() - known_options.keys()))
            raise InputFileError(f"{artifact.directory}: the {name} backend has no options {unknown_options}")
        backends.append(backend_named(name, {**compile_options, **run_values}))
    return backends


def backend_of(artifact: Artifact, name: str, run_options: Mapping[str, Any] | None = None) -> Backend[Any]:
    """One of the backends that wrote an artifact.

    Args:
        artifact: The artifact.
        name: Its name.
        run_options: See `backends_of`.

    Raises:
        UsageError: It did not; and see `backends_of`.
        InputFileError: See `backends_of`.
    """
    require_backend(artifact, name)
    return next(backend for backend in backends_of(artifact, run_options) if backend.name == name)


def require_backend(artifact: Artifact, name: str) -> None:
    """Make sure that a backend wrote an artifact.

    Raises:
        UsageError: It did not.
    """
    there = artifact.manifest.backends
    if name not in there:
        raise UsageError(
            f"{artifact.directory} was compiled without the {name} backend (it has: {', '.join(there)}); "
            f"compile it with --backend {name}"
        )


def keeper_of_lanes(artifact: Artifact) -> Backend[Any] | None:
    """The backend of an artifact that keeps the lane program itself; None if none does.

    Raises:
        InputFileError: A file is damaged.
    """
    return next((backend for backend in backends_of(artifact) if backend.reference(artifact) is not None), None)


def lanes_in(artifact: Artifact) -> Reference | None:
    """The lane program that an artifact itself holds, with its weights; None if none of its backends keeps it.

    Raises:
        InputFileError: A file is damaged.
    """
    references = (backend.reference(artifact) for backend in backends_of(artifact))
    return next((reference for reference in references if reference is not None), None)


def require_lanes(artifact: Artifact) -> Reference:
    """The lane program of an artifact that must hold it.

    Raises:
        UsageError: It does not.
        InputFileError: A file is damaged.
    """
    lanes = lanes_in(artifact)
    if lanes is None:
        raise UsageError(
            f"{artifact.directory}: holds no lane program but for a runtime of its own; compile the model with "
            f"--backend {','.join(dict.fromkeys((DEFAULT_BACKEND, *artifact.manifest.backends)))}"
        )
    return lanes


def options_of(name: str, *, at_run: bool) -> dict[str, Any]:
    """The annotations of a backend's options, by field name: those of a run, or those of a compile."""
    return annotations_of(backend_class(name).Options, at_run=at_run)
