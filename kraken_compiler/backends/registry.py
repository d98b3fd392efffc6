"""The backends there are. Adding one is adding it to the tuple."""

from __future__ import annotations

import difflib

from kraken_compiler.backends.base import Backend
from kraken_compiler.backends.onnx_ort.emit import OnnxBackend
from kraken_compiler.backends.torch_dist.emit import TorchBackend
from kraken_compiler.errors import UsageError

BACKENDS: tuple[Backend, ...] = (TorchBackend(), OnnxBackend())


def backend_named(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UsageError: There is none; names the nearest.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = [backend.name for backend in BACKENDS]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise UsageError(f"unknown backend '{name}' (known: {', '.join(known)}){hint}")
