"""Which of an artifact's programs a run takes. Imports no torch."""

from __future__ import annotations

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.errors import UsageError
from kraken_compiler.runtime.options import RunOptions

WORKERS = {"torch": "kraken_compiler.runtime.worker", "onnx": "kraken_compiler.runtime.onnx_worker"}
"""The module that ranks run, by backend; the first that an artifact has is the default."""

_OF_TORCH = {"device": "choose what computes with --provider", "compile": "it is for torch.compile"}
_OF_ONNX = {"provider": "choose what computes with --device"}


def choose_backend(options: RunOptions, artifact: Artifact) -> str:
    """The backend that the options ask for, or else the first of `WORKERS` that the artifact has.

    Raises:
        UsageError: The artifact does not have it, or another option does not go with it.
    """
    held = artifact.manifest.backends
    backend = options.backend or next((name for name in WORKERS if name in held), "torch")
    if backend not in held:
        raise UsageError(
            f"{artifact.directory} was compiled without the {backend} backend (it has: {', '.join(held)}); "
            f"compile it with --backend {backend}"
        )
    for name, instead in (_OF_TORCH if backend == "onnx" else _OF_ONNX).items():
        if getattr(options, name):
            raise UsageError(f"--{name} does not go with the {backend} backend: {instead}")
    return backend


def require_backend(backend: str, options: RunOptions, artifact: Artifact) -> None:
    """Make sure, in a worker, that it is the one to run the artifact.

    Raises:
        UsageError: It is not.
    """
    chosen = choose_backend(options, artifact)
    if chosen != backend:
        raise UsageError(f"this runs the {backend} backend: start {WORKERS[chosen]}, or give --backend {backend}")
