"""One rank that measures what the machine does, as `kraken-probe` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kraken_compiler.commands.probe import measured_figures
from kraken_compiler.latency.probe import Figures, probe_sums
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks
from ttft_parts.rank_loop import run_rank

COLLECTIVE_TIMEOUT = 600.0


class Rank:
    """Its methods are the parent's commands."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        status = StatusWriter(settings["rank"], None)
        self.ranks = Ranks.rendezvous(Place.from_environment(), status, COLLECTIVE_TIMEOUT)

    def hello(self) -> None:
        """Only to be answered: the group is complete."""

    def probe(self, dtypes: list[str], artifact: str) -> Figures:
        """All figures of the machine, and sums on the link as it is now."""
        return measured_figures(self.ranks, dtypes, Path(artifact), lambda done, total: None)

    def probe_sums(self) -> list[Figures]:
        """Sums on the link as it is now."""
        return probe_sums(self.ranks)


if __name__ == "__main__":
    run_rank(Rank)
