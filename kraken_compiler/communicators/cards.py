"""Plain values that every rank of a process group shows to all others, as JSON and never as pickles."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.communicators.agreement import Claims, disagreement
from kraken_compiler.communicators.peers import Card


def swap_cards(card: Card, group: dist.ProcessGroup) -> list[Card]:
    """Every rank's card, rank 0's first; all ranks of the group must call it together."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    text = json.dumps(card).encode()
    sizes = [int(size) for size in _gather(torch.tensor([len(text)], device=device), group)]
    padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8).to(device)
    return [json.loads(bytes(other.tolist())) for other in _gather(padded, group)]


def require_agreement(claims: Claims, group: dist.ProcessGroup) -> None:
    """Make sure that the ranks of a group fit together; all of them must call it together.

    Args:
        claims: This rank's.
        group: The ranks.

    Raises:
        InputFileError, UsageError, RankFailedError: They do not; this rank's own trouble is raised as it is.
    """
    cards = swap_cards(claims.to_dict(), group)
    if claims.trouble is not None:
        raise claims.trouble
    found = disagreement({rank: Claims.from_dict(card) for rank, card in enumerate(cards)})
    if found is not None:
        raise found


def _gather(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybodys, own, group=group)
    return everybodys
