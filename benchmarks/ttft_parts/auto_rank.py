"""One rank that opens an artifact as `kraken-run` does, and times prefills at once and as `--overlap auto` has them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from kraken_compiler.backends.open_model import open_model
from kraken_compiler.backends.registry import backend_named
from kraken_compiler.generate.decoder import SplitDecoder
from kraken_compiler.generate.split_threshold import LENGTHS, split_threshold
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks
from ttft_parts.rank_loop import run_rank

COLLECTIVE_TIMEOUT = 600.0


class Rank:
    """Its methods are the parent's commands."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.backend = backend_named(settings["backend"], settings["options"])
        status = StatusWriter(settings["rank"], None)
        self.ranks = Ranks.rendezvous(Place.from_environment(), status, COLLECTIVE_TIMEOUT)
        _, self.model = open_model(settings["artifact"], self.ranks, lambda artifact: self.backend)

    def hello(self) -> None:
        """Only to be answered: the group is complete."""

    def time(self, ids: list[int], directory: str, setting: str, repetitions: int) -> dict[str, Any]:
        """Seconds of a prefill at once and as `auto` reads it, by turns, and from how many tokens on that is in halves.

        Args:
            ids: The prompt.
            directory: Where the threshold is kept, for all prompts on this link.
            setting: Names the link.
            repetitions: How often each way.
        """
        decoder = self.model.decoder(1, max(len(ids), LENGTHS[-1]))
        assert isinstance(decoder, SplitDecoder), "the model can be read in two halves"
        threshold = split_threshold(decoder, LENGTHS, self.ranks, Path(directory), setting)
        prompt, lengths = np.array([ids], np.int64), np.array([len(ids)])
        seconds: dict[str, list[float]] = {"whole": [], "auto": []}
        for _ in range(1 + repetitions):
            for name, split_from in (("whole", None), ("auto", threshold)):
                decoder.reset()
                decoder.split_from = split_from
                self.ranks.barrier()
                began = time.perf_counter()
                decoder.prefill(prompt, lengths)
                seconds[name].append(time.perf_counter() - began)
        return {"threshold": threshold, **{name: values[1:] for name, values in seconds.items()}}


if __name__ == "__main__":
    run_rank(Rank)
