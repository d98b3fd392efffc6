"""What the tests of generation share, and what ranks run in them. Apart from them: a rank does not import pytest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kraken_compiler.backends.open_model import open_model
from kraken_compiler.backends.registry import backend_named
from kraken_compiler.backends.torch_dist.run.model import TorchModel
from kraken_compiler.generate.decoder import Array
from kraken_compiler.generate.engine import Engine, GenerationRequest, first_rank_decides
from kraken_compiler.generate.loop import generate
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.ranks.session import Ranks
from tests.torch_ranks import model_of

VOCABULARY = 40
NEW_TOKENS = 6


def continuation(logits_of: Callable[[Tensor], Tensor], prompt: list[int], count: int) -> list[int]:
    """The most likely tokens of a model, written as plainly as possible."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(logits_of(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


class NearTies:
    """A decoder whose logits are ties, but for the last bit of a rank's own."""

    identical_on_all_ranks = False

    def __init__(self, batch: int, rank: int) -> None:
        self.batch = batch
        self.capacity = 100
        self._rank = rank

    def prefill(self, ids: Array, lengths: Array) -> Array:
        return self._logits()

    def step(self, tokens: Array) -> Array:
        return self._logits()

    def reset(self) -> None:
        pass

    def _logits(self) -> Array:
        logits = np.ones((self.batch, VOCABULARY), np.float32)
        logits[:, 3 + self._rank] = np.nextafter(np.float32(1), np.float32(2))
        return logits


def broadcast_sizes(ranks: Ranks) -> list[int]:
    """Sizes of contents that did not arrive as they were sent."""
    wrong = []
    for size in (0, 1, 503, 504, 505, 5000):
        content = bytes(number % 251 for number in range(size))
        if ranks.broadcast(content if ranks.rank == 0 else None) != content:
            wrong.append(size)
    return wrong


def choose_near_ties(payload: Mapping[str, Any], ranks: Ranks) -> list[list[list[int | None]]]:
    """Tokens of this rank: greedy and sampled with agreement, and then greedy without."""
    assert broadcast_sizes(ranks) == []
    decoder = NearTies(2, ranks.rank)
    agree = first_rank_decides(ranks)
    ways = ((Sampling(), agree), (Sampling(1.0, seed=5), agree), (Sampling(), None))
    return [list(generate(decoder, [[1], [1, 2]], 20, sampling=sampling, agree=agree)) for sampling, agree in ways]


def logits_of_ranks(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What this rank's cached decoders promise, and the bytes of their logits, by artifact."""
    found = {}
    for path in payload["artifacts"]:
        decoder = model_of(path, ranks).decoder(2, 30)
        logits = [decoder.prefill(np.array([[5, 6, 7], [8, 0, 0]]), np.array([3, 1]))]
        logits += [decoder.step(np.array([token, token + 1])) for token in range(9, 14)]
        found[path] = [decoder.identical_on_all_ranks, np.stack(logits).tobytes().hex()]
    return found


def ranks_apart(payload: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Generation on ranks as on machines of their own, which compute otherwise: rank 1's norms are not those of rank 0.

    Returns:
        By backend: what its decoder promises, the bytes of logits, and greedy and sampled tokens, with how often rank
        0's choice was taken for each.
    """
    ranks.place = replace(ranks.place, local_degree=1)
    broadcast, choices = ranks.broadcast, []

    def counted(content: bytes | None) -> bytes:
        choices.append(broadcast(content))
        return choices[-1]

    found = {}
    for name in ("torch", "onnx"):
        artifact, model = open_model(payload["artifact"], ranks, lambda artifact, name=name: backend_named(name))
        if isinstance(model, TorchModel) and ranks.rank:
            weights = model.program.weights
            for place, weight in list(weights.named_parameters()):
                if weight.dim() == 1:
                    setattr(weights, place, nn.Parameter(1.001 * weight, requires_grad=False))
        decoder = model.decoder(1, 20)
        assert decoder is not None
        logits = [decoder.prefill(np.array([[5, 6, 7]]), np.array([3])).copy(), decoder.step(np.array([9])).copy()]
        engine, tokens, agreements = Engine(artifact, model, ranks), [], []
        ranks.broadcast = counted  # type: ignore[method-assign]
        for sampling in (Sampling(), Sampling(1.0, seed=3)):
            choices.clear()
            tokens.append(list(engine._carry_out(GenerationRequest([[5, 6, 7]], NEW_TOKENS, 20, sampling))))
            agreements.append(len(choices))
        ranks.broadcast = broadcast  # type: ignore[method-assign]
        found[name] = {
            "promise": decoder.identical_on_all_ranks,
            "logits": np.stack(logits).tobytes().hex(),
            "tokens": tokens,
            "agreements": agreements,
        }
    return found
