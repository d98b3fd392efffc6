"""Several ranks on a host with fewer NUMA nodes than ranks, which vLLM does not provide for: they share it.

By default vLLM gives every rank a node of its own, its cores and nearly all of its memory, and ends where there are too
few. What the user has set is left.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_visible_memory_node
from vllm.utils.mem_constants import GiB_bytes

from kraken_compiler.backends.vllm.run.environment import THREADS_BIND

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CACHE_BYTES = 4 * GiB_bytes
"""Most memory for the KV cache of a rank; half of what is free is left in any case."""


def share_host(vllm_config: VllmConfig) -> None:
    """Let this host's ranks share its cores and its memory, if it has too few nodes."""
    ranks = vllm_config.parallel_config.local_world_size
    if not current_platform.is_cpu() or len(get_visible_memory_node()) >= ranks:
        return
    if THREADS_BIND not in os.environ:
        os.environ[THREADS_BIND] = "nobind"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // ranks, 1)))
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        free = psutil.virtual_memory().available
        cache.kv_cache_memory_bytes = min(_CACHE_BYTES, free // (2 * ranks))
