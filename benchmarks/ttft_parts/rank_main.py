"""One rank with torch: joins the process group, then does what the parent says."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from kraken_compiler.ranks.communicators.message import TensorSums
from ttft_parts.contenders import Contender
from ttft_parts.decoders import Decoder, Factory
from ttft_parts.rank_loop import RankLoop, run_rank
from ttft_parts.step_profile import profiled

COLLECTIVE_TIMEOUT = timedelta(seconds=600)


class Rank(RankLoop):
    """Runs our torch backend, and the peers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        artifacts = {form: Path(path) for form, path in settings["artifacts"].items()}
        dtype = getattr(torch, settings["dtype"])
        self.factory = Factory(Path(settings["model"]), artifacts, dtype, self.degree)

    def start_prompt(self, ids: list[list[int]]) -> None:
        torch.compiler.reset()
        # Several contenders' prefills and steps share transformers' code objects, each a specialisation of its own.
        torch._dynamo.config.recompile_limit = 64
        super().start_prompt(ids)

    def make(self, contender: Contender, capacity: int) -> Decoder:
        return self.factory.make(contender, capacity)

    def profile(self, contender: str, steps: int) -> dict[str, float]:
        """Where the time of decode steps goes."""
        decoder, token = self.decoders[contender], self.tokens([0])
        decoder.reset()
        decoder.prefill(self.ids)
        decoder.step(token)
        self.barrier()
        return profiled(lambda: decoder.step(token), TensorSums, steps)

    def barrier(self) -> None:
        dist.barrier()

    def tokens(self, values: list[Any]) -> Tensor:
        return torch.tensor(values)

    def as_array(self, logits: Any) -> npt.NDArray[np.float32]:
        copied: npt.NDArray[np.float32] = logits.detach().float().clone().numpy()
        return copied

    def measure_link(self, send_bytes: int, reduce_bytes: list[int]) -> dict[str, Any]:
        """Rate of one large message, and the time of all-reduces, as gloo reaches them between warm connections."""
        message = torch.zeros(send_bytes, dtype=torch.uint8)
        token = torch.zeros(1)
        rates = []
        for _ in range(3):
            dist.barrier()
            began = time.perf_counter()
            if self.rank == 0:
                dist.send(message, 1)
                dist.recv(token, 1)
            elif self.rank == 1:
                dist.recv(message, 0)
                dist.send(token, 0)
            rates.append(send_bytes * 8 / (time.perf_counter() - began) / 1e9)
        return {"gbits": sorted(rates)[1], "all_reduce": {str(size): _reduce_seconds(size) for size in reduce_bytes}}


def _reduce_seconds(size: int) -> float:
    values = torch.zeros(max(1, size // 4))
    seconds = []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[3]


def joined(settings: dict[str, Any]) -> Rank:
    """This process as one of the group's ranks."""
    rank, degree = settings["rank"], settings["degree"]
    torch.set_num_threads(1)
    store = dist.FileStore(settings["store"], degree)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=degree, timeout=COLLECTIVE_TIMEOUT)
    return Rank(settings)


if __name__ == "__main__":
    run_rank(joined)
