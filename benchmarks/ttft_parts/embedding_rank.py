"""One rank that opens artifacts of the same model side by side, and times their first tokens and steps by turns."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kraken_compiler.backends.open_model import open_model
from kraken_compiler.backends.registry import backend_named
from kraken_compiler.ranks.environment import Place
from kraken_compiler.ranks.heartbeat import StatusWriter
from kraken_compiler.ranks.session import Ranks
from ttft_parts.rank_loop import run_rank

COLLECTIVE_TIMEOUT = 600.0


class Rank:
    """Its methods are the parent's commands."""

    def __init__(self, settings: dict[str, Any]) -> None:
        backend = backend_named(settings["backend"], {})
        status = StatusWriter(settings["rank"], None)
        self.ranks = Ranks.rendezvous(Place.from_environment(), status, COLLECTIVE_TIMEOUT)
        self.models = {
            name: open_model(path, self.ranks, lambda artifact: backend)[1]
            for name, path in settings["artifacts"].items()
        }

    def hello(self) -> None:
        """Only to be answered: the group is complete."""

    def time(self, ids: list[int], steps: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
        """Seconds to the first token and of a following one, by the artifact's name and repetition.

        Args:
            ids: The prompt.
            steps: How many tokens follow it.
            repetitions: How often each artifact has its turn; in every other repetition in reverse order.
        """
        prompt, lengths = np.array([ids], np.int64), np.array([len(ids)])
        decoders = {name: model.decoder(1, len(ids) + steps + 1) for name, model in self.models.items()}
        seconds: dict[str, dict[str, list[float]]] = {name: {"first": [], "step": []} for name in decoders}
        for repetition in range(-1, repetitions):
            for name in list(decoders)[:: 1 if repetition % 2 else -1]:
                decoder = decoders[name]
                assert decoder is not None, "the model has a KV cache"
                decoder.reset()
                self.ranks.barrier()
                began = time.perf_counter()
                token = decoder.prefill(prompt, lengths).argmax(-1)
                first = time.perf_counter()
                for _ in range(steps):
                    token = decoder.step(token).argmax(-1)
                last = time.perf_counter()
                if repetition >= 0:
                    seconds[name]["first"].append(first - began)
                    seconds[name]["step"].append((last - first) / steps)
        return seconds


if __name__ == "__main__":
    run_rank(Rank)
