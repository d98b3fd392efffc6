"""Plain values that every rank of a process group shows to all others, as JSON and never as pickles."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.ranks.communicators.peers import RankInfo


def exchange_info(info: RankInfo, group: dist.ProcessGroup) -> list[RankInfo]:
    """Every rank's info, rank 0's first; all ranks of the group must call it together."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    text = json.dumps(info).encode()
    sizes = [int(size) for size in _gather(torch.tensor([len(text)], device=device), group)]
    padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8).to(device)
    return [json.loads(bytes(other.tolist())) for other in _gather(padded, group)]


def _gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return parts
